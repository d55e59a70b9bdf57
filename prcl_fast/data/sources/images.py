"""Image and mask files: read and written with Pillow; every failure is one line that names the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from prcl_fast.errors import InputError
from prcl_fast.files.reading import check_regular
from prcl_fast.files.writing import replacing

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")  # lossless: a lossy format alters ids

_IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")
_MASK_FORMATS = ("PNG", "BMP", "TIFF")
_COLOUR_MODES = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")
# Pillow stretches grey PNGs of 2 and 4 bits to 0..255; division restores the ids of the file.
_STRETCHED = {"L;2": 85, "L;4": 17}
_GREYS = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1)


@dataclass(frozen=True, eq=False)
class Mask:
    """A decoded label file.

    Attributes:
        pixels: uint8 [H, W], the ids of a palette, grey, 1-bit or (if the values fit) 16-bit image; or
            uint8 [H, W, 3], the colours of an RGB mask.
        colours: uint8 [n, 3], the colours in which a viewer shows ids 0 to n - 1; None for 16 bits and RGB.
        coloured: the file has a palette, and not merely one of the greys 0, 1, 2, ...
        opaque: no pixel is transparent; checked for RGB masks only.
    """

    pixels: np.ndarray
    colours: np.ndarray | None = None
    coloured: bool = False
    opaque: bool = True


def read_image(path: Path) -> np.ndarray:
    """Decodes an image as it is stored (the EXIF orientation is not applied).

    Returns:
        uint8 [H, W, 3], RGB. Grey and palette images become RGB, transparency is dropped.

    Raises:
        InputError: missing, damaged, more than 8 bits per channel, or more than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    with _opened(path, _IMAGE_FORMATS) as image:
        if image.mode not in _COLOUR_MODES or _wide(image):
            raise InputError(
                f"{path}: 8 bits a channel are expected, this image has mode {_true_mode(image)}"
            )
        image.info.pop("transparency", None)
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def read_mask(path: Path) -> np.ndarray:
    """The pixels of a label file, as in `Mask`. Raises InputError as `decode_mask` does."""
    return decode_mask(path).pixels


def decode_mask(path: Path) -> Mask:
    """Decodes a label file.

    Raises:
        InputError: missing, damaged, not lossless, ids above 255, or an unsuitable mode.
    """
    with _opened(path, _MASK_FORMATS) as image:
        if image.mode in ("P", "L", "1"):
            stretch = 255 if image.mode == "1" else _STRETCHED.get(_raw_mode(image), 1)
            pixels = np.array(image, dtype=np.uint8)
            if image.mode == "P":
                colours = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
                grey = len(colours) > 1 and np.array_equal(colours, _GREYS[: len(colours)])
                return Mask(pixels, colours, coloured=not grey)
            ids = pixels // stretch if 1 < stretch < 255 else pixels
            return Mask(ids, _GREYS[::stretch])
        if image.mode.startswith("I"):
            wide = np.array(image)
            if wide.min() < 0 or wide.max() > 255:
                outside = int(wide.max() if wide.max() > 255 else wide.min())
                raise InputError(f"{path}: label id {outside}; ids are 0 to 255")
            return Mask(wide.astype(np.uint8))
        if image.mode in ("RGB", "RGBA", "RGBX") and not _wide(image):
            opaque = image.mode != "RGBA" or image.getchannel("A").getextrema() == (255, 255)
            return Mask(np.array(image if image.mode == "RGB" else image.convert("RGB")), opaque=opaque)
        raise InputError(f"{path}: a mask of ids is expected, this image has mode {_true_mode(image)}")


def image_size(path: Path) -> tuple[int, int]:
    """Height and width from the header alone. Raises InputError."""
    with _opened(path, _IMAGE_FORMATS) as image:
        return image.height, image.width


def check_pair(image: Path, image_size: Sequence[int], label: Path, label_size: Sequence[int]) -> None:
    """Raises InputError, naming both files, if (height, width) of image and label differ."""
    if tuple(image_size[:2]) != tuple(label_size[:2]):
        raise InputError(
            f"{image} is {image_size[1]} x {image_size[0]} pixels, its label {label} is "
            f"{label_size[1]} x {label_size[0]}"
        )


def save_index_png(path: Path, label: np.ndarray, palette: np.ndarray) -> None:
    """Writes ids as a palette PNG, whole or not at all.

    Args:
        path: file to write; parent folders are created.
        label: uint8 [H, W].
        palette: uint8 [C, 3]; 255 is shown in the pale yellow of VOC's borders.
    """
    colours = np.zeros((256, 3), dtype=np.uint8)
    colours[: len(palette)] = palette
    if len(palette) < 256:
        colours[255] = (224, 224, 192)
    image = Image.fromarray(label)
    image.putpalette(colours.tobytes())
    with replacing(path) as file:
        image.save(file, format="PNG")


@contextmanager
def _opened(path: Path, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    check_regular(path, "file")
    try:
        with Image.open(path, formats=formats) as image:
            pixels = image.width * image.height
            # Pillow itself only warns up to twice the bound.
            if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
                raise InputError(
                    f"{path}: {pixels} pixels, more than the bound of {Image.MAX_IMAGE_PIXELS} on one image"
                )
            yield image
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{path}: not a readable {', '.join(formats)} file") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path}: far more pixels than the bound of {Image.MAX_IMAGE_PIXELS}") from None
    # Pillow's decoders raise many kinds of exceptions for damaged bytes.
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{path}: cannot be decoded: {reason}") from None


def _raw_mode(image: Image.Image) -> str:
    """Pixel format in the file, such as "RGB;16B" or "L;4", from Pillow's tile."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0].args if tiles else ""
    if isinstance(arguments, tuple):
        arguments = arguments[0] if arguments else ""
    return str(arguments)


def _wide(image: Image.Image) -> bool:
    return image.format in ("PNG", "TIFF") and ";16" in _raw_mode(image)


def _true_mode(image: Image.Image) -> str:
    return _raw_mode(image) if _wide(image) else image.mode
