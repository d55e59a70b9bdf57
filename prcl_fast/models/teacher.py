"""The teacher: an exponential moving average of the student."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from prcl_fast.models.network import NetworkOutput, SegmentationNetwork


class EMATeacher(nn.Module):
    """A copy of the student that follows it as an exponential moving average; it never learns by gradient.

    Parameters and floating-point buffers (the BN statistics) are averaged, integer buffers copied. The
    teacher is always in evaluation mode, so its BN uses the averaged statistics whatever the batch. (The
    authors' public code runs it in training mode and leaves its buffers out of the average.)

    Args:
        student: the network to follow; not compiled, not wrapped.
        decay: the largest decay, reached once 1 - 1 / (step + 1) passes it.

    Attributes:
        network: the averaged network, for evaluation and export.
    """

    def __init__(self, student: SegmentationNetwork, decay: float = 0.99) -> None:
        super().__init__()
        self.network = copy.deepcopy(student).requires_grad_(False).eval()
        self.decay = decay
        # Held in a tuple so that the student is no submodule: its weights are not the teacher's state.
        self._student = (student,)

    def train(self, mode: bool = True) -> EMATeacher:
        """Does nothing: the teacher stays in evaluation mode."""
        return self

    @torch.no_grad()
    def forward(self, x: Tensor, *, representations: bool = False) -> NetworkOutput:
        """The averaged network's output on images [B, 3, H, W]; only the logits unless asked for more."""
        return self.network(x, representations=representations)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the student with decay min(1 - 1 / (step + 1), decay); step 0 copies it.

        Args:
            step: number of updates made before this one.
        """
        teacher_floats, teacher_others = _state(self.network)
        student_floats, student_others = _state(self._student[0])
        decay = min(1.0 - 1.0 / (step + 1), self.decay)
        torch._foreach_lerp_(teacher_floats, student_floats, 1.0 - decay)
        torch._foreach_copy_(teacher_others, student_others)


def _state(network: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and buffers, floating-point ones and the others.

    Collected anew at each update: moving a module to a device replaces its buffers, and a stored list would
    go on averaging the old ones.
    """
    floats: list[Tensor] = list(network.parameters())
    others: list[Tensor] = []
    for buffer in network.buffers():
        (floats if buffer.is_floating_point() else others).append(buffer)
    return floats, others
