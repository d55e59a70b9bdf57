"""The file of decoded images: a header, the pixels of each image, and an index with their checksums.

Numbers are little-endian. An image is H * W * 4 bytes at a multiple of 64, so that it can be used in place.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from prcl_fast.data.source import IGNORE
from prcl_fast.errors import WriteError
from prcl_fast.files.folders import private_fault
from prcl_fast.files.writing import open_plain

VERSION = 1

_ALIGNMENT = 64
# Magic, version, checksum of the index, number of images, length of the file; the checksum of these follows.
_HEADER = struct.Struct("<8sIIQQ")
_CHECKSUM = struct.Struct("<I")
_MAGIC = b"PRCLIMGS"
_INDEX = np.dtype([("offset", "<i8"), ("height", "<i4"), ("width", "<i4"), ("checksum", "<u4")])


class DamagedFileError(Exception):
    """A file that is incomplete, changed, or of another version."""


class ImageFile:
    """The images of a file written by `write_images`, mapped into memory on first use.

    Processes share the mapped memory. Pickling keeps the path alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes: np.ndarray | None = None
        self._index: list[tuple[int, int, int, int]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_bytes": None, "_index": []}

    def __len__(self) -> int:
        self._map()
        return len(self._index)

    def __getitem__(self, position: int) -> np.ndarray:
        """uint8 [H, W, 4], read-only, in the mapped memory.

        Raises:
            OSError, DamagedFileError: the file is missing or damaged.
        """
        mapped = self._map()
        offset, height, width, _ = self._index[position]
        return mapped[offset : offset + height * width * 4].reshape(height, width, 4)

    def verify(self, labeled: Sequence[bool], classes: int, threads: int) -> None:
        """Reads the whole file and verifies the checksums, and the class ids of the labeled images.

        Raises:
            OSError, DamagedFileError: the file cannot be read, or is damaged.
        """
        self._map()

        def fault(position: int) -> str | None:
            pixels = self[position]
            if zlib.crc32(pixels.data) != self._index[position][3]:
                return "a checksum is wrong"
            label = pixels[..., 3]
            if labeled[position] and ((label >= classes) & (label != IGNORE)).any():
                return f"a class id of image {position} is {int(label[label != IGNORE].max())}"
            return None

        with ThreadPoolExecutor(max(threads, 1)) as pool:
            for found in pool.map(fault, range(len(self._index))):
                if found is not None:
                    raise DamagedFileError(f"{self.path}: {found}")

    def _map(self) -> np.ndarray:
        if self._bytes is None:
            mapped = _mapped(self.path)
            self._index = _read_index(self.path, mapped)
            self._bytes = mapped
        return self._bytes


def write_images(file: BinaryIO, images: Iterable[np.ndarray]) -> int:
    """Writes images, uint8 [H, W, 4] and contiguous, into a new file, and returns its length.

    The header comes last: a file that was not written to its end is a damaged one.
    """
    entries = []
    file.write(bytes(_ALIGNMENT))
    for image in images:
        entries.append((file.tell(), *image.shape[:2], zlib.crc32(image.data)))
        file.write(image.data)
        file.write(bytes(-image.nbytes % _ALIGNMENT))
    index = np.array(entries, dtype=_INDEX).tobytes()
    file.write(index)
    length = file.tell()
    header = _HEADER.pack(_MAGIC, VERSION, zlib.crc32(index), len(entries), length)
    file.seek(0)
    file.write(header + _CHECKSUM.pack(zlib.crc32(header)))
    return length


def _mapped(path: Path) -> np.ndarray:
    """The bytes of a plain file of this user's own that nobody else may write."""
    try:
        descriptor = open_plain(path, os.O_RDONLY)
    except WriteError:
        raise DamagedFileError(f"{path}: no plain file") from None
    try:
        state = os.fstat(descriptor)
        fault = private_fault(state)
        if fault is not None or state.st_size < _ALIGNMENT:
            raise DamagedFileError(f"{path}: {fault or 'too short'}")
        # np.memmap would do the same, but slicing it is several times slower.
        return np.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    finally:
        os.close(descriptor)


def _read_index(path: Path, mapped: np.ndarray) -> list[tuple[int, int, int, int]]:
    header = mapped[: _HEADER.size].tobytes()
    magic, version, checksum, count, length = _HEADER.unpack(header)
    (header_checksum,) = _CHECKSUM.unpack(mapped[_HEADER.size :][: _CHECKSUM.size].tobytes())
    if (magic, version, header_checksum) != (_MAGIC, VERSION, zlib.crc32(header)):
        raise DamagedFileError(f"{path}: not a file of decoded images of this version")
    if length != len(mapped):
        raise DamagedFileError(f"{path}: {len(mapped)} bytes long instead of {length}")
    start = length - count * _INDEX.itemsize
    if start < _ALIGNMENT:
        raise DamagedFileError(f"{path}: too short for {count} images")
    index = mapped[start:].tobytes()
    if zlib.crc32(index) != checksum:
        raise DamagedFileError(f"{path}: the checksum of its index is wrong")
    entries: list[tuple[int, int, int, int]] = np.frombuffer(index, dtype=_INDEX).tolist()
    for position, (offset, height, width, _) in enumerate(entries):
        outside = offset < _ALIGNMENT or offset + height * width * 4 > start
        if outside or min(height, width) < 1 or offset % _ALIGNMENT:
            raise DamagedFileError(f"{path}: the place or size of image {position} is impossible")
    return entries
