"""Image and mask files: read and written with Pillow; every failure is one line that names the file."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from prcl_fast.config.data import MAX_PIXELS
from prcl_fast.data.sources.orientation import orientation_of, stored_size, turn_of, upright_size
from prcl_fast.errors import InputError
from prcl_fast.files.reading import check_regular
from prcl_fast.files.writing import replacing

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff")
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
# Files of these suffixes are images, too, which are not read.
UNREAD_SUFFIXES = (
    *(".gif", ".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".psd", ".svg", ".tga", ".exr", ".hdr"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".dng", ".nef", ".cr2", ".cr3", ".arw", ".raf", ".orf", ".rw2"),
)
# To be raised with every change of what `read_image` or `read_mask` make of a file: caches are then renewed.
READING = 3

_IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")
_MASK_FORMATS = ("PNG", "BMP", "TIFF")
_COLOUR_MODES = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")
# Pillow stretches grey PNGs of 2 and 4 bits to 0..255; division restores the ids of the file.
_STRETCHED = {"L;2": 85, "L;4": 17}
_MAX_SCANS = 50  # of a progressive JPEG; the usual ones have 10, optimised ones some 20
# Formats in which no mask is read, by the first bytes of a file and by the suffixes.
_NO_MASKS = {b"\xff\xd8\xff": "JPEG", b"RIFF": "WebP", b"GIF8": "GIF"}
_LOSSY = "a lossy format alters ids"
_GIF = "programs that write GIF files give the colours other ids"
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


def why_unread(path: Path, read: tuple[str, ...]) -> str:
    """The reason why an image file cannot be used where `read` is IMAGE_SUFFIXES or MASK_SUFFIXES."""
    if read != MASK_SUFFIXES:
        return f"images are {', '.join(IMAGE_SUFFIXES)}"
    suffix = path.suffix.lower()
    reason = _GIF if suffix == ".gif" else _LOSSY if suffix in IMAGE_SUFFIXES else "it is not read"
    return f"{reason}; masks are {', '.join(MASK_SUFFIXES)}"


class Header(NamedTuple):
    """Size of an image as it is shown, in pixels, and its EXIF orientation, 1 to 8."""

    height: int
    width: int
    orientation: int


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes an image as viewers show it: its EXIF orientation is applied.

    Returns:
        uint8 [H, W, 3], RGB. Grey and palette images become RGB, transparency is dropped.

    Raises:
        InputError: missing, damaged, more than 8 bits per channel, more than `max_pixels`, or a progressive
            JPEG of too many scans.
    """
    with _opened(path, _IMAGE_FORMATS, max_pixels) as image:
        if image.mode not in _COLOUR_MODES or _wide(image):
            raise InputError(
                f"{path}: 8 bits a channel are expected, this image has mode {_true_mode(image)}"
            )
        if image.info.get("progressive"):
            _check_scans(path, image.width * image.height)
        turn = turn_of(image)
        image.info.pop("transparency", None)
        colours = image if image.mode == "RGB" else image.convert("RGB")
        return np.array(colours if turn is None else colours.transpose(turn))


def read_mask(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The pixels of a label file, as in `Mask`. Raises InputError as `decode_mask` does."""
    return decode_mask(path, max_pixels).pixels


def decode_mask(path: Path, max_pixels: int = MAX_PIXELS) -> Mask:
    """Decodes a label file as viewers show it: its EXIF orientation is applied, as that of its image is.

    Raises:
        InputError: missing, damaged, not lossless, ids above 255, an unsuitable mode, or more than
            `max_pixels`.
    """
    with _opened(path, _MASK_FORMATS, max_pixels) as image:
        turn = turn_of(image)
        mask = _decoded_mask(path, image)
        if turn is None:
            return mask
        return replace(mask, pixels=np.array(Image.fromarray(mask.pixels).transpose(turn)))


def _decoded_mask(path: Path, image: Image.Image) -> Mask:
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


def read_header(path: Path, max_pixels: int = MAX_PIXELS) -> Header:
    """The size of an image and its orientation, without decoding it. Raises InputError."""
    with _opened(path, _IMAGE_FORMATS, max_pixels) as image:
        width, height = upright_size(image)
        return Header(height, width, orientation_of(image))


def png_texts(path: Path) -> dict[str, str]:
    """The texts of a PNG in front of its pixels; empty for any other file."""
    with suppress(InputError), _opened(path, ("PNG",), None) as image:
        return {str(key): text for key, text in image.info.items() if isinstance(text, str)}
    return {}


def check_pair(image: Path, header: Header, label: Path, label_size: tuple[int, ...]) -> None:
    """Raises InputError, naming both files, if (height, width) of image and label differ."""
    if header[:2] != label_size[:2]:
        turned = ""
        if header.orientation > 1:
            turned = (
                f"; the EXIF orientation {header.orientation} of the image is applied, as viewers do: if the "
                "label fits the stored pixels, remove the EXIF tag"
            )
        raise InputError(
            f"{image} is {header.width} x {header.height} pixels, its label {label} is "
            f"{label_size[1]} x {label_size[0]}{turned}"
        )


def save_index_png(
    path: Path, label: np.ndarray, palette: np.ndarray, texts: Mapping[str, str] | None = None
) -> None:
    """Writes ids as a palette PNG, whole or not at all.

    Args:
        path: file to write; parent folders are created.
        label: uint8 [H, W].
        palette: uint8 [C, 3]; 255 is shown in the pale yellow of VOC's borders.
        texts: stored in the PNG by their keys.
    """
    colours = np.zeros((256, 3), dtype=np.uint8)
    colours[: len(palette)] = palette
    if len(palette) < 256:
        colours[255] = (224, 224, 192)
    image = Image.fromarray(label)
    image.putpalette(colours.tobytes())
    save_png(path, image, texts or {})


def save_png(path: Path, image: Image.Image, texts: Mapping[str, str]) -> None:
    """Writes a PNG with texts, whole or not at all. Raises WriteError."""
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    with replacing(path) as file:
        image.save(file, format="PNG", pnginfo=info)


@contextmanager
def _opened(path: Path, formats: tuple[str, ...], max_pixels: int | None) -> Iterator[Image.Image]:
    check_regular(path, "file")
    try:
        with path.open("rb") as file, _recognised(file, path, formats) as image:
            width, height = stored_size(image)
            if max_pixels is not None and width * height > max_pixels:
                raise InputError(
                    f"{path}: {width} x {height} is {width * height} pixels, more than the bound of "
                    f"{max_pixels} on one image; data.max_pixels (data convert: --max-pixels) raises it"
                )
            yield image
    except InputError:
        raise
    # Pillow's decoders raise many kinds of exceptions for damaged bytes.
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{path}: cannot be decoded: {reason}") from None


def _recognised(file: BinaryIO, path: Path, formats: tuple[str, ...]) -> Image.Image:
    """The image in a file, its header read.

    As Image.open, but without Pillow's bound on the pixels: that one holds for the whole process, and prints
    a warning before it refuses.
    """
    start = file.read(16)
    for name in formats:
        if name not in Image.OPEN:
            Image.init()
        factory, accept = Image.OPEN[name]
        accepted = accept is None or accept(start)
        if accepted and not isinstance(accepted, str):  # a text says why Pillow cannot read the format
            file.seek(0)
            with suppress(SyntaxError, IndexError, TypeError, struct.error):
                # With a file name, Pillow maps raw pixels into memory. There a TIFF that is turned by 90
                # degrees has the wrong width, and a file that becomes shorter ends the process.
                return factory(file, "")
    kind = next((kind for first, kind in _NO_MASKS.items() if start.startswith(first)), None)
    if kind is not None and formats == _MASK_FORMATS:
        reason = _GIF if kind == "GIF" else _LOSSY
        raise InputError(f"{path}: a {kind} file; {reason}; masks are {', '.join(_MASK_FORMATS)} files")
    raise InputError(f"{path}: not a readable {', '.join(formats)} file")


def _check_scans(path: Path, pixels: int) -> None:
    """Raises InputError if a progressive JPEG has too many scans; each is a pass over all pixels."""
    count, unread, last = 0, 4 * pixels + 2**24, b""
    with path.open("rb") as file:
        while unread > 0 and (block := file.read(2**20)):
            # Within the data of a scan, a zero follows each byte ff.
            count += (last + block).count(b"\xff\xda")
            last = block[-1:]
            unread -= len(block)
            if count > _MAX_SCANS:
                raise InputError(f"{path}: a progressive JPEG of more than {_MAX_SCANS} scans; save it anew")


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
