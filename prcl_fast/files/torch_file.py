"""Files of tensors: the directory of the archive is checked before PyTorch unpacks it."""

from __future__ import annotations

import zipfile
from pathlib import Path

from prcl_fast.errors import InputError
from prcl_fast.files.reading import check_regular

_ZIP_MAGIC = b"PK\x03\x04"
_ENCRYPTED = 0x1


def check_torch_file(path: str | Path, what: str = "weights file") -> None:
    """Refuses a file that may take more memory to unpack than the file is long.

    PyTorch stores the entries of its ZIP archives uncompressed, so it did not write a compressed entry.
    Files of PyTorch's older format are no archives; they must only be plain files.

    Args:
        what: the kind of file for messages.

    Raises:
        InputError: naming the file: missing, no plain file, a damaged archive, an entry that is compressed,
            encrypted or repeated, or entries that claim more bytes than the file has.
    """
    size = check_regular(path, what)
    try:
        with open(path, "rb") as file:
            if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
                return
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    # A damaged directory fails in many ways: counts, offsets, names, versions, extra fields.
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{path}: not a readable {what}: {reason}") from None
    fault = _fault(entries, size)
    if fault:
        raise InputError(f"{path}: not a readable {what}: {fault}")


def _fault(entries: list[zipfile.ZipInfo], size: int) -> str | None:
    # With bytes before the archive, two readers may find its directory in two places.
    if min((entry.header_offset for entry in entries), default=0) != 0:
        return "its archive does not begin at the first byte"
    names = set()
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            return f"entry {entry.filename!r} is compressed"
        if entry.flag_bits & _ENCRYPTED:
            return f"entry {entry.filename!r} is encrypted"
        if entry.filename in names:
            return f"entry {entry.filename!r} is there twice"
        if entry.header_offset + entry.file_size > size:
            return f"entry {entry.filename!r} claims {entry.file_size} bytes, the file has {size}"
        names.add(entry.filename)
    claimed = sum(entry.file_size for entry in entries)
    return f"its entries claim {claimed} bytes, the file has {size}" if claimed > size else None
