"""Replicas of a run's state: networks and prototypes must be bitwise equal on all ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prcl_fast.errors import RunError
from prcl_fast.processes.collectives import maximum, world_size

_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class DriftError(RunError):
    """The state differs between ranks."""


def check_alike(state: Mapping[str, Tensor]) -> None:
    """Compares the bits of a state over all ranks, by a checksum of each tensor. Reads from the device.

    Raises:
        DriftError: on every rank, naming the first entry that differs.
    """
    if world_size() == 1:
        return
    bits = torch.stack([_checksum(tensor) for tensor in state.values()])
    highest = maximum(torch.stack([bits, -bits]))
    differs = (highest[0] != -highest[1]).nonzero()[:, 0]
    if len(differs):
        name = list(state)[int(differs[0])]
        raise DriftError(
            f"the processes no longer hold the same {name} ({len(differs)} of {len(state)} entries differ); "
            "the last checkpoint is from before it was noticed"
        )


def _checksum(tensor: Tensor) -> Tensor:
    """int64 scalar: the sum of the elements' bits, read as integers, each times an odd number of its own."""
    integers = tensor.detach().contiguous().flatten().view(_AS_INTEGERS[tensor.element_size()]).long()
    position = torch.arange(1, 2 * len(integers), 2, device=tensor.device)
    return (integers * position).sum() & 0x7FFF_FFFF_FFFF_FFFF
