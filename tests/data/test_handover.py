"""The hand-over of tensors between processes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from prcl_fast.data.handover import memory_file, pack, receive, send, unpack
from prcl_fast.errors import RunError


@dataclass(frozen=True)
class Inner:
    flags: Tensor
    empty: Tensor


@dataclass(frozen=True)
class Item:
    image: Tensor
    inner: Inner | None
    number: Tensor
    name: str


def item() -> Item:
    image = torch.arange(5 * 7 * 3, dtype=torch.uint8).view(5, 7, 3).permute(2, 0, 1)
    inner = Inner(torch.tensor([True, False, True]), torch.empty(0, 4))
    return Item(image, inner, torch.tensor(2.5, dtype=torch.float64), "a name")


def handed_over(value: object) -> object:
    here, there = multiprocessing.Pipe()
    packed = pack(value)
    file = memory_file(packed)
    send(there, packed, file)
    os.close(file)
    return receive(here)


@pytest.mark.parametrize("way", [handed_over, lambda value: unpack(*in_one_block(value))])
def test_an_item_arrives_as_it_was_sent(way) -> None:
    sent, got = item(), way(item())
    assert got.name == sent.name
    pairs = [(got.image, sent.image), (got.inner.flags, sent.inner.flags), (got.number, sent.number)]
    for found, expected in [*pairs, (got.inner.empty, sent.inner.empty)]:
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    got.image.add_(1)  # it can be written
    assert handed_over(Item(sent.image, None, sent.number, "")).inner is None


def in_one_block(value: object) -> tuple[object, Tensor]:
    packed = pack(value)
    memory = torch.zeros(packed.size, dtype=torch.uint8)
    for offset, tensor in packed.tensors:
        memory[offset : offset + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
    return packed.outline, memory


def test_an_item_takes_one_descriptor_that_is_free_again_with_its_tensors() -> None:
    def number() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = number()
    got = handed_over(item())
    assert number() == before + 1
    del got
    assert number() == before


def test_a_receiver_without_a_free_descriptor_names_the_limit() -> None:
    here, there = multiprocessing.Pipe()
    packed = pack(item())
    file = memory_file(packed)
    send(there, packed, file)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(RunError, match=r"too many open files .*ulimit -n"):
            receive(here)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(file)


def test_a_file_without_room_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    packed = pack(item())
    monkeypatch.setattr(os, "pwrite", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No space"):
        memory_file(packed)
    assert len(os.listdir("/proc/self/fd")) == before
