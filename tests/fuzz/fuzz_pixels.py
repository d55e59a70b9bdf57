"""Masks and images spoilt at random."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_bytes import Case, damaged
from PIL import Image

_MODES = ["1", "L", "P", "RGB", "RGBA", "LA", "I", "I;16", "F", "CMYK", "YCbCr", "HSV", "LAB"]
_USUAL = ["PNG", "TIFF", "BMP", "WEBP", "JPEG", "GIF"]
_FORMATS = _USUAL * 3 + ["PPM", "ICO", "TGA", "EPS", "PDF"]


def mask(rng: random.Random, folder: Path) -> Case:
    path = rng.choice(sorted((folder / "SegmentationClass").iterdir()))
    if rng.random() < 0.3:
        ids = np.array(Image.open(path))
        ids[rng.randrange(64) :] = rng.choice([5, 6, 7, 254, 255])
        Image.fromarray(ids).save(path)
    else:
        _spoil_pixels(rng, path)
    return Case(["data", "check", "config.yaml"], (path.name,))


def image(rng: random.Random, folder: Path) -> Case:
    path = rng.choice(sorted((folder / "JPEGImages").iterdir()))
    _spoil_pixels(rng, path)
    fast = ["--fast"] if rng.random() < 0.2 else []
    return Case(["data", "check", "config.yaml", *fast], (path.name,))


def _spoil_pixels(rng: random.Random, path: Path) -> None:
    content = path.read_bytes()
    way = rng.randrange(5)
    if way:
        content = _written_anew(rng, Image.open(io.BytesIO(content))) or content
    if way == 2 and content.startswith(b"\x89PNG"):
        content = _other_chunks(rng, content)
    elif way in (0, 2, 3):
        content = damaged(rng, content)
    path.write_bytes(content)


def _written_anew(rng: random.Random, picture: Image.Image) -> bytes | None:
    """The picture in another mode, size and format; None where the format does not support the mode."""
    size = rng.choice([picture.size] * 4 + [(1, 1), (64, 63), (63, 64), (1, 2000), (300, 200)])
    kind = rng.choice(_FORMATS)
    options: dict[str, Any] = {}
    if kind in ("TIFF", "WEBP", "PNG", "GIF") and rng.random() < 0.3:
        options = {"save_all": True, "append_images": [picture.convert("RGB")] * rng.choice([1, 20])}
    file = io.BytesIO()
    try:
        picture.convert(rng.choice(_MODES)).resize(size).save(file, format=kind, **options)
    except Exception:  # each of Pillow's formats raises errors of its own
        return None
    return file.getvalue()


def _other_chunks(rng: random.Random, png: bytes) -> bytes:
    """The PNG with a wrong header or oversized text, and right checksums."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = bytearray(png[16:29])
    way = rng.randrange(3)
    if way == 0:
        header[:8] = struct.pack(">II", *rng.choices([0, 1, 63, 64, 9000, 2**16, 2**31 - 1, 2**32 - 1], k=2))
    elif way == 1:
        header[8:] = bytes(rng.choices([0, 1, 2, 3, 4, 6, 8, 16, 255], k=5))
    text = zlib.compress(bytes(rng.choice([10, 2**20, 2**23])))
    more = [
        *(b"", chunk(b"zTXt", b"a\0\0" + text), chunk(b"iTXt", b"a\0\1\0\0\0" + text)),
        chunk(b"iCCP", b"a\0\0" + text),
    ]
    return png[:8] + chunk(b"IHDR", bytes(header)) + rng.choice(more) * rng.choice([1, 5]) + png[33:]
