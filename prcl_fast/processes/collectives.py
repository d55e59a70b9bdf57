"""Collectives over the ranks of a run: sum, maximum, all-gather of tensors and texts, broadcast of a text."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """The number of ranks of the run; 1 where no process group was joined."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def backend(device: str) -> str:
    """The communication backend for tensors on "cpu" or "cuda": "gloo", "nccl", ..."""
    pairs = (pair.split(":") for pair in dist.get_backend_config().split(","))
    return dict(pairs)[device]


def rank() -> int:
    """The rank of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def summed(values: Tensor) -> Tensor:
    """The all-reduced sum, in place and bitwise equal on all ranks. Every rank must call it."""
    return start_sum(values)()


def start_sum(values: Tensor) -> Callable[[], Tensor]:
    """Starts `summed` and returns a function that waits for it, so that other work can overlap with it."""
    if world_size() == 1:
        return lambda: values
    work = dist.all_reduce(values, async_op=True)

    def wait() -> Tensor:
        assert work is not None  # it is None only outside of the group
        work.wait()
        return values

    return wait


def gathered(values: Tensor) -> Tensor:
    """[W, ...]: the values of all ranks, bitwise equal on each. Every rank must call it."""
    found = values.new_empty(world_size(), *values.shape)
    if not values.is_cuda:
        dist.all_gather(list(found.unbind()), values)
    elif hasattr(dist, "all_gather_single"):  # PyTorch 2.13's name
        dist.all_gather_single(found, values)
    else:
        dist.all_gather_into_tensor(found, values)
    return found


def broadcast_text(text: str) -> str:
    """The text of rank 0, on all ranks. Every rank must call it."""
    if world_size() == 1:
        return text
    length = summed(torch.tensor(len(text.encode()) if rank() == 0 else 0))
    content = torch.zeros(int(length), dtype=torch.int64)
    if rank() == 0:
        content = torch.tensor(list(text.encode()), dtype=torch.int64)
    return bytes(summed(content).tolist()).decode()


def gathered_texts(text: str) -> list[str]:
    """The texts of all ranks, on each. Every rank must call it."""
    content = torch.tensor(list(text.encode()), dtype=torch.uint8)
    lengths = gathered(torch.tensor(len(content))).tolist()
    padded = content.new_zeros(max(lengths))
    padded[: len(content)] = content
    return [
        bytes(row[:length].tolist()).decode() for row, length in zip(gathered(padded), lengths, strict=True)
    ]


def maximum(values: Tensor) -> Tensor:
    """The all-reduced element-wise maximum, in place. Every rank must call it."""
    if world_size() > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values
