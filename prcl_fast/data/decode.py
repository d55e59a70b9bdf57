"""Decoding of an image and its label into one array, for batches and caches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from prcl_fast.data.source import IGNORE, Source
from prcl_fast.errors import InputError


def decode(source: Source, name: str, labeled: bool) -> np.ndarray:
    """An image and its label, uint8 [H, W, 4], contiguous: red, green, blue, label (255 where there is none).

    Raises:
        InputError: any failure of the source, in one line that names the file, else the image id.
    """
    image = _read(source.image, name)
    pixels = np.empty((*image.shape[:2], 4), dtype=np.uint8)
    pixels[..., :3] = image
    if labeled:
        label = _read(source.label, name)
        if label.shape != image.shape[:2]:
            sizes = [" x ".join(map(str, array.shape[:2])) for array in (image, label)]
            raise InputError(f"{name}: the image is {sizes[0]} pixels, its label {sizes[1]}")
        pixels[..., 3] = label
    else:
        pixels[..., 3] = IGNORE
    return pixels


def _read(read: Callable[[str], np.ndarray], name: str) -> np.ndarray:
    try:
        return read(name)
    except InputError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise InputError(f"{name}: cannot be decoded: {type(error).__name__}: {text}") from error
