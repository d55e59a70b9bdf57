"""This process among those of a run: which one it is, and what they add up together."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """The number of processes of the run; 1 where no process group was joined."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def backend(device: str) -> str:
    """What carries the processes' tensors on "cpu" or "cuda": "gloo", "nccl", ..."""
    pairs = (pair.split(":") for pair in dist.get_backend_config().split(","))
    return dict(pairs)[device]


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, in place, the same bits on each of them; every process must call it."""
    return start_sum(values)()


def start_sum(values: Tensor) -> Callable[[], Tensor]:
    """Starts `summed` and returns what waits for it: work done in between overlaps with it."""
    if world_size() == 1:
        return lambda: values
    work = dist.all_reduce(values, async_op=True)

    def wait() -> Tensor:
        assert work is not None  # None only outside the group
        work.wait()
        return values

    return wait


def gathered(values: Tensor) -> Tensor:
    """[W, ...]: the values of every process by rank, the same bits on all; every process must call it."""
    found = values.new_empty(world_size(), *values.shape)
    if not values.is_cuda:
        dist.all_gather(list(found.unbind()), values)
    elif hasattr(dist, "all_gather_single"):  # PyTorch 2.13's name
        dist.all_gather_single(found, values)
    else:
        dist.all_gather_into_tensor(found, values)
    return found


def first_says(text: str) -> str:
    """What process 0 gives, in all processes; every process must call it."""
    if world_size() == 1:
        return text
    length = summed(torch.tensor(len(text.encode()) if rank() == 0 else 0))
    content = torch.zeros(int(length), dtype=torch.int64)
    if rank() == 0:
        content = torch.tensor(list(text.encode()), dtype=torch.int64)
    return bytes(summed(content).tolist()).decode()


def largest(values: Tensor) -> Tensor:
    """The element-wise maximum over all processes, in place; every process must call it."""
    if world_size() > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values
