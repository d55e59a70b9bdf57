"""Files of tensors: format and archive directory are checked before PyTorch unpacks them."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from prcl_fast.errors import InputError
from prcl_fast.files.reading import check_regular

_ZIP_MAGIC = b"PK\x03\x04"
_ENCRYPTED = 0x1
_HEAD = 512  # bytes at the begin of a file that tell its format
_LFS = b"version https://git-lfs"
_TAR_PLACE, _TAR = 257, b"ustar"
_SAFETENSORS = re.compile(rb"[\x00-\xff]{8}\{\s*\"")  # the header's length, then the header, a JSON object
# The first bytes of formats that are taken for weights, and what to do.
_FORMATS = {
    b"\x1f\x8b": "a gzip file; unpack it first",
    b"BZh": "a bzip2 file; unpack it first",
    b"\xfd7zXZ\0": "an xz file; unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd file; unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive; unpack it first",
    b"Rar!": "a RAR archive; unpack it first",
    b"\x89HDF": "an HDF5 file, as of Keras; its weights must be converted",
    b"\x93NUMPY": "a NumPy array; a state dict of torch.save is expected",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
}


def check_torch_file(path: str | Path, what: str = "weights file") -> None:
    """Refuses a file that may take more memory to unpack than the file is long.

    PyTorch stores the entries of its ZIP archives uncompressed, so it did not write a compressed entry.
    Files of PyTorch's older format are no archives. Formats of others that are often taken for weights are
    named: web pages, Git LFS pointers, safetensors, TorchScript, compressed files.

    Args:
        what: the kind of file for messages.

    Raises:
        InputError: naming the file: missing, no plain file, of another format, a damaged archive, an entry
            that is compressed, encrypted or repeated, or entries that claim more bytes than the file has.
    """
    size = check_regular(path, what)
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
            if not head.startswith(_ZIP_MAGIC):
                foreign = _foreign_format(head)
                if foreign:
                    raise InputError(f"{path}: not a readable {what}: {foreign}")
                return
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except InputError:
        raise
    # A damaged directory fails in many ways: counts, offsets, names, versions, extra fields.
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{path}: not a readable {what}: {reason}") from None
    fault = _foreign_archive({entry.filename for entry in entries}) or _fault(entries, size)
    if fault:
        raise InputError(f"{path}: not a readable {what}: {fault}")


def _foreign_format(head: bytes) -> str | None:
    """The format of another program's file, by its first bytes; None for a pickle or an unknown one."""
    if not head:
        return "it is empty"
    for magic, kind in _FORMATS.items():
        if head.startswith(magic):
            return f"it is {kind}"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<"):
        return "it is a web page (HTML): the download failed, or needs a log-in or a confirmation"
    if text.startswith(_LFS):
        return "it is a Git LFS pointer, not the file itself; `git lfs pull` fetches that"
    if _SAFETENSORS.match(head):
        return (
            "it is a safetensors file; convert it in Python: "
            "torch.save(safetensors.torch.load_file(OLD), NEW)"
        )
    if head[_TAR_PLACE:].startswith(_TAR):
        return "it is a tar archive; unpack it first"
    return None


def _foreign_archive(names: set[str]) -> str | None:
    """The format of a foreign ZIP archive, by the names of its entries; None for one of torch.save."""
    parts = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in parts:
        return (
            "it is a TorchScript file; convert it in Python: "
            "torch.save(torch.jit.load(OLD).state_dict(), NEW)"
        )
    if "data.pkl" not in parts:
        shown = ", ".join(sorted(parts)[:3])
        return (
            f"it is no archive of torch.save (it contains {shown[:80]!r}); a ZIP file must be unpacked first"
        )
    return None


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
