"""Checkpoint files: a file of `torch.save` with its own SHA-256, verified before it is unpickled.

`torch.save` writes a ZIP archive, and such an archive may end with a comment. Here the comment is a fixed
text and the SHA-256, in hexadecimal, of all bytes before it. PyTorch skips the comment, so plain `torch.load`
opens the file too.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from prcl_fast.errors import InputError
from prcl_fast.files.reading import check_regular
from prcl_fast.files.torch_file import check_torch_file
from prcl_fast.models.weights import tensors_of

_FORMAT = "prcl_fast-checkpoint"
_VERSION = 2
_COMMENT = b"prcl_fast-checkpoint sha256 "
_DIGEST = 64  # hexadecimal digits
_END_RECORD = b"PK\x05\x06"  # begins 22 bytes whose last two are the comment's length
_END = 22
_BEGIN = 4096  # bytes at the begin of the file that contain the format's name
_BLOCK = 1 << 20  # bytes hashed at a time

_KINDS: dict[str, type] = {
    "config": dict,
    "classes": list,
    "palette": list,
    "iteration": int,
    "method": dict,
    "optimizer": dict,
    "scaler": dict,
    "progress": dict,
}


class DamagedCheckpointError(InputError):
    """The bytes of a checkpoint are not those that were written."""


def pack(state: dict[str, Any]) -> memoryview:
    """The bytes of the checkpoint file of `state`."""
    # In memory, because PyTorch's own writer answers a full disk with a C++ error instead of an OSError.
    archive = io.BytesIO()
    torch.save({"format": _FORMAT, "version": _VERSION, **state}, archive)
    archive.seek(-2, os.SEEK_END)
    archive.write(struct.pack("<H", len(_COMMENT) + _DIGEST) + _COMMENT)
    with archive.getbuffer() as data:  # the archive can grow again once this is released
        digest = hashlib.sha256(data).hexdigest()
    archive.write(digest.encode())
    return archive.getbuffer()


def read(path: Path) -> dict[str, Any]:
    """The state that was packed into the file `path`, on the CPU. The file is held in memory once.

    Raises:
        DamagedCheckpointError: the bytes are not those that were written.
        InputError: missing, unreadable, or made by another version of this program.
    """
    check_regular(path, "checkpoint")
    try:
        # One open file for both passes: a run may replace it by a newer one at any time.
        with path.open("rb") as file:
            _verify(file, path)
            check_torch_file(path, "checkpoint")
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except OSError as error:
        raise DamagedCheckpointError(
            f"{path}: damaged: it cannot be read: {error.strerror or error}"
        ) from None
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: not a checkpoint of prcl_fast: {reason}") from None
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise InputError(f"{path}: not a checkpoint of prcl_fast")
    if state.get("version") != _VERSION:
        raise InputError(f"{path}: checkpoint version {state.get('version')}, this program reads {_VERSION}")
    return state


def is_checkpoint(path: Path) -> bool:
    """Whether a file begins as the checkpoints of this program do; False where it cannot be read."""
    try:
        check_regular(path, "checkpoint")
        with path.open("rb") as file:
            return _FORMAT.encode() in _read_at(file, 0, _BEGIN)
    except (InputError, OSError):
        return False


def check_state(state: Mapping[str, Any], path: Path) -> None:
    """Raises InputError that names `path` and the entry that is missing or of the wrong type."""
    for key, kind in _KINDS.items():
        if not isinstance(state.get(key), kind):
            raise InputError(f"{path}: incomplete checkpoint, it lacks {key} or holds a wrong type of it")
    for key, value in tensors_of(state["method"], path).items():
        stored = value.untyped_storage().nbytes()
        if value.nbytes > stored:  # an expanded tensor: a small file may claim any size
            raise InputError(
                f"{path}: damaged checkpoint: {key} is {list(value.shape)}, the file has {stored} bytes of it"
            )
    whole = {
        "classes": 2 <= len(state["classes"]) <= 255
        and all(isinstance(name, str) for name in state["classes"]),
        "palette": all(_is_colour(colour) for colour in state["palette"])
        and len(state["palette"]) == len(state["classes"]),
        "iteration": state["iteration"] >= 0 and not isinstance(state["iteration"], bool),
        "progress": _is_progress(state["progress"]),
        "scaler": all(_is_number(value) for value in state["scaler"].values()),
        # Checkpoints of former versions have neither of them.
        "data": _are_texts(state.get("data", {})),
        "starts": _are_records(state.get("starts", [])),
    }
    for key, is_whole in whole.items():
        if not is_whole:
            raise InputError(f"{path}: damaged checkpoint: wrong values in {key}")


def check_optimizer(
    saved: Mapping[str, Any], own: Mapping[str, Any], shapes: Iterable[Any], path: Path
) -> None:
    """Raises InputError unless `saved` has the groups of `own` and finite momentum of these shapes."""
    groups, buffers = saved.get("param_groups"), saved.get("state")
    same = isinstance(groups, list) and [_names(group) for group in groups] == [
        _names(group) for group in own["param_groups"]
    ]
    shapes = list(shapes)
    if (
        not same
        or not isinstance(buffers, dict)
        or not all(
            isinstance(index, int)
            and 0 <= index < len(shapes)
            and isinstance(entry, dict)
            and set(entry) == {"momentum_buffer"}
            and _is_buffer(entry["momentum_buffer"], shapes[index])
            for index, entry in buffers.items()
        )
    ):
        raise InputError(
            f"{path}: does not fit this configuration: the state of its optimizer is of other parameters, or "
            "not finite"
        )


def _verify(file: BinaryIO, path: Path) -> None:
    size = file.seek(0, os.SEEK_END)
    count = f"({size} bytes)"
    hashed = size - _DIGEST
    if _read_at(file, hashed - len(_COMMENT) - _END, _END + len(_COMMENT)).endswith(_COMMENT):
        file.seek(0)
        digest = hashlib.sha256()
        while hashed:
            block = file.read(min(hashed, _BLOCK))
            if not block:
                break
            digest.update(block)
            hashed -= len(block)
        if file.read(_DIGEST) != digest.hexdigest().encode():
            raise DamagedCheckpointError(f"{path}: damaged: its checksum does not match {count}")
        return
    # The archive's first file begins with the format's name, uncompressed.
    if not size or _FORMAT.encode() in _read_at(file, 0, _BEGIN):
        end = _read_at(file, size - _END, _END)
        if end.startswith(_END_RECORD) and end.endswith(b"\0\0"):  # a whole archive without a comment
            raise InputError(f"{path}: made by an older version of prcl_fast, which this one cannot read")
        raise DamagedCheckpointError(f"{path}: damaged: truncated, or overwritten at its end {count}")
    raise DamagedCheckpointError(f"{path}: damaged, or not a checkpoint of prcl_fast {count}")


def _read_at(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(max(position, 0))
    return file.read(count)


def _names(group: object) -> object:
    if not isinstance(group, dict):
        return None
    kinds = {key: type(value) for key, value in group.items() if key not in ("lr", "params")}
    return kinds, group.get("params")


def _is_buffer(value: object, shape: Any) -> bool:
    if value is None:
        return True
    return (
        isinstance(value, Tensor)
        and not value.is_meta
        and not value.is_sparse
        and value.shape == shape
        and value.is_floating_point()
        and bool(value.isfinite().all())
    )


def _are_texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for pair in value.items() for text in pair)


def _are_records(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(record, dict) for record in value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_colour(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(c) is int and 0 <= c < 256 for c in value)


def _is_progress(progress: Mapping[str, Any]) -> bool:
    numbers = (progress.get(key) for key in ("seconds", "best_miou", "best_iteration", "evaluated"))
    return all(_is_number(value) for value in numbers) and isinstance(progress.get("last"), dict)
