"""What all processes of a run must hold alike: networks and prototypes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prcl_fast.errors import RunError
from prcl_fast.processes.collectives import largest, world_size

_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class DriftError(RunError):
    """Processes hold different values of what they must hold alike."""


def check_alike(state: Mapping[str, Tensor]) -> None:
    """Compares a state's bits over all processes, by one number for each tensor. Reads from the device.

    Raises:
        DriftError: in every process, naming the first entry that differs.
    """
    if world_size() == 1:
        return
    bits = torch.stack([_checksum(tensor) for tensor in state.values()])
    highest = largest(torch.stack([bits, -bits]))
    differs = (highest[0] != -highest[1]).nonzero()[:, 0]
    if len(differs):
        name = list(state)[int(differs[0])]
        raise DriftError(
            f"the processes no longer hold the same {name} ({len(differs)} of {len(state)} entries differ); "
            "the last checkpoint is from before it was noticed"
        )


def _checksum(tensor: Tensor) -> Tensor:
    """int64 scalar: the sum of the bits, taken as integers, each times its odd position."""
    integers = tensor.detach().contiguous().flatten().view(_AS_INTEGERS[tensor.element_size()]).long()
    position = torch.arange(1, 2 * len(integers), 2, device=tensor.device)
    return (integers * position).sum() & 0x7FFF_FFFF_FFFF_FFFF
