"""EXIF orientation of image files: the turn by which viewers and labeling tools show an image."""

from __future__ import annotations

import struct

from PIL import Image

_TAG, _SHORT = 0x0112, 3
_Turn = Image.Transpose
_TURNS = {
    2: _Turn.FLIP_LEFT_RIGHT,
    3: _Turn.ROTATE_180,
    4: _Turn.FLIP_TOP_BOTTOM,
    5: _Turn.TRANSPOSE,
    6: _Turn.ROTATE_270,
    7: _Turn.TRANSVERSE,
    8: _Turn.ROTATE_90,
}


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of an open image, 1 (upright) to 8, from the header alone.

    1 where there is no EXIF block in front of the pixels, or a damaged one: viewers ignore it.
    """
    tags = getattr(image, "tag_v2", None)  # of a TIFF
    if tags is not None:
        value = tags.get(_TAG)
        return value if value in _TURNS else 1
    exif = image.info.get("exif")
    return _from_exif(exif) if isinstance(exif, bytes) else 1


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of the pixels in the file. Raises KeyError for a TIFF without them."""
    tags = getattr(image, "tag_v2", None)
    # The size of an open TIFF is that of the upright image, from Pillow 11 on.
    return image.size if tags is None else (int(tags[256]), int(tags[257]))


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an open image as it is shown."""
    width, height = stored_size(image)
    return (height, width) if orientation_of(image) >= 5 else (width, height)


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """The turn that makes the decoded pixels of an open image upright; to be asked before it is decoded."""
    # Pillow turns a TIFF while it decodes it.
    return None if image.format == "TIFF" else _TURNS.get(orientation_of(image))


def _from_exif(exif: bytes) -> int:
    """The orientation in an EXIF block: a TIFF header and a directory of entries of 12 bytes."""
    block = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, values, value = struct.unpack_from(f"{order}HHIH", block, place)
            if tag == _TAG:
                return value if (kind, values) == (_SHORT, 1) and value in _TURNS else 1
    except struct.error:  # the block ends too early
        pass
    return 1
