"""One image with its label as it goes into a batch or a cache."""

from __future__ import annotations

import numpy as np

from prcl_fast.data.source import IGNORE, Source
from prcl_fast.data.sources.file_source import FileSource
from prcl_fast.errors import InputError


def decode(source: Source, name: str, labeled: bool) -> np.ndarray:
    """An image and its label, uint8 [H, W, 4], contiguous: red, green, blue, label (255 where there is none).

    Raises:
        InputError: whatever goes wrong, in one line that names the file, or the image if it has none.
    """
    image = _read(source, name, "image")
    pixels = np.empty((*image.shape[:2], 4), dtype=np.uint8)
    pixels[..., :3] = image
    if labeled:
        label = _read(source, name, "label")
        if label.shape != image.shape[:2]:
            sizes = [" x ".join(map(str, array.shape[:2])) for array in (image, label)]
            raise InputError(f"{name}: the image is {sizes[0]} pixels, its label {sizes[1]}")
        pixels[..., 3] = label
    else:
        pixels[..., 3] = IGNORE
    return pixels


def _read(source: Source, name: str, what: str) -> np.ndarray:
    try:
        return source.image(name) if what == "image" else source.label(name)
    except InputError:
        raise
    except Exception as error:
        where = name
        if isinstance(source, FileSource):
            where = str(source.images[name] if what == "image" else source.labels[name].path)
        text = " ".join(str(error).split())
        raise InputError(f"{where}: cannot be decoded: {type(error).__name__}: {text}") from error
