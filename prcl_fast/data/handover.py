"""Hand-over of tensors to another process: one anonymous memory file for each item.

`memfd_create` memory belongs to no mounted file system. Thus /dev/shm, of which Docker gives a container
64 MB, needs no room, and no temporary folder is used, whose path may be too long for a socket. An item takes
one file descriptor, however many tensors it has.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import torch
from torch import Tensor

from prcl_fast.errors import RunError

_ALIGNMENT = 64


@dataclass(frozen=True)
class _Place:
    """The place of a tensor in the memory of its item."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, memory: Tensor) -> Tensor:
        length = math.prod(self.shape) * self.dtype.itemsize
        return memory[self.offset : self.offset + length].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Packed:
    """An item without its tensors, and where they go."""

    outline: Any
    tensors: tuple[tuple[int, Tensor], ...]  # byte offset, contiguous CPU tensor
    size: int  # bytes, at least 1


def pack(item: Any) -> Packed:
    """Takes the CPU tensors out of a dataclass, which may hold further dataclasses."""
    tensors: list[tuple[int, Tensor]] = []
    end = 0

    def place(tensor: Tensor) -> _Place:
        nonlocal end
        offset = math.ceil(end / _ALIGNMENT) * _ALIGNMENT
        end = offset + tensor.nbytes
        tensors.append((offset, tensor.contiguous()))
        return _Place(offset, tensor.dtype, tuple(tensor.shape))

    outline = _with_replaced(item, Tensor, place)
    return Packed(outline, tuple(tensors), max(end, 1))


def unpack(outline: Any, memory: Tensor) -> Any:
    """The item again; its tensors are views of `memory`, uint8 [size]."""
    return _with_replaced(outline, _Place, lambda place: place.of(memory))


def pinned(item: Any) -> Any:
    """A copy in page-locked memory, which is one block for all tensors."""
    packed = pack(item)
    memory = torch.empty(packed.size, dtype=torch.uint8, pin_memory=True)
    for offset, tensor in packed.tensors:
        memory[offset : offset + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
    return unpack(packed.outline, memory)


def memory_file(packed: Packed) -> int:
    """The descriptor of a new memory file with the tensors. Raises OSError where there is no room."""
    file = _new_file()
    try:
        os.ftruncate(file, packed.size)
        for offset, tensor in packed.tensors:
            data = tensor.reshape(-1).view(torch.uint8).numpy().data
            while data:
                written = os.pwrite(file, data, offset)
                data, offset = data[written:], offset + written
    except BaseException:
        os.close(file)
        raise
    return file


def send(connection: Connection, packed: Packed, file: int) -> None:
    """Sends an item with its memory file, which stays open here. Raises OSError."""
    connection.send((packed.outline, packed.size))
    send_handle(connection, file, None)


def receive(connection: Connection) -> Any:
    """The next item of `send`, or the next object of `connection.send`; tensors are in shared memory.

    Raises:
        EOFError, ConnectionError: the sender has ended.
        RunError: this process may open no more files.
    """
    message = connection.recv()
    if not isinstance(message, tuple):
        return message
    outline, size = message
    try:
        file = recv_handle(connection)
    except ConnectionError:
        raise
    except (RuntimeError, OSError):  # RuntimeError: the message came without its descriptor
        raise RunError("too many open files in this process: raise the limit (ulimit -n)") from None
    try:
        memory = mmap.mmap(file, size)
    except OSError as error:
        raise RunError(f"{size} bytes of a data worker cannot be mapped: {error.strerror}") from None
    finally:
        os.close(file)
    return unpack(outline, torch.frombuffer(memory, dtype=torch.uint8))


def _new_file() -> int:
    if sys.platform == "linux":
        return os.memfd_create("prcl_fast")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _with_replaced(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """A dataclass with the values of type `kind` in it, and in its dataclasses, replaced."""
    if isinstance(value, kind):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {part.name: getattr(value, part.name) for part in fields(value)}
        return type(value)(**{name: _with_replaced(part, kind, change) for name, part in parts.items()})
    return value
