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
        self._flat: tuple[FlatState, FlatState] | None = None

    def train(self, mode: bool = True) -> EMATeacher:
        """Does nothing: the teacher stays in evaluation mode."""
        return self

    @torch.no_grad()
    def forward(self, x: Tensor, *, representations: bool = False) -> NetworkOutput:
        """The averaged network's output on images [B, 3, H, W]; only the logits unless asked for more."""
        return self.network(x, representations=representations)

    def lay_out_flat(self) -> None:
        """Moves both networks' floating-point state into one tensor each, so that `update` is one pass.

        `update` does this where it finds the networks elsewhere. Called early, it spares what is compiled or
        captured before the first update a change of addresses.
        """
        self._flat = FlatState(self.network), FlatState(self._student[0])

    @torch.no_grad()
    def update(self, iteration: Tensor) -> None:
        """Move towards the student with decay min(1 - 1 / (iteration + 1), decay); iteration 0 copies it.

        Args:
            iteration: integer scalar on the networks' device, the number of updates made before this one.
        """
        if self._flat is None or not self._flat[0].holds(self.network):
            self.lay_out_flat()
        assert self._flat is not None
        teacher, student = self._flat
        decay = (1.0 - 1.0 / (iteration.double() + 1.0)).clamp(max=self.decay)
        teacher.values.lerp_(student.values, (1.0 - decay).to(teacher.values.dtype))
        torch._foreach_copy_(teacher.others, student.others)


_ALIGNMENT = 64  # elements: what an allocator of PyTorch gives, and vector loads and cuDNN expect


class FlatState:
    """Moves a network's floating-point parameters and buffers into one tensor; their values stay.

    Each keeps its identity, shape and strides and becomes a view. Moving the network to another device or
    type undoes this: see `holds`.

    Attributes:
        values: [N] of the network's floating-point type; between the views lie zeros.
        others: the buffers of other types.

    Raises:
        TypeError: the network has floating-point tensors of more than one type or device.
    """

    @torch.no_grad()
    def __init__(self, network: nn.Module) -> None:
        state: list[Tensor] = [*network.parameters(), *network.buffers()]
        self._tensors = [tensor for tensor in state if tensor.is_floating_point()]
        self.others = [tensor for tensor in state if not tensor.is_floating_point()]
        first = self._tensors[0]
        if any((x.dtype, x.device) != (first.dtype, first.device) for x in self._tensors):
            raise TypeError("a flat state needs floating-point tensors of one type on one device")
        room = [-(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT for tensor in self._tensors]
        self.values = first.new_zeros(sum(room))
        for tensor, part in zip(self._tensors, self.values.split(room), strict=True):
            view = part.as_strided(tensor.shape, _dense_strides(tensor))
            view.copy_(tensor)
            tensor.data = view

    def holds(self, network: nn.Module) -> bool:
        """Whether the network still lies here."""
        return next(network.parameters()).data_ptr() == self.values.data_ptr()


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Its own where it has no gaps, those of a contiguous tensor otherwise."""
    return torch.empty_like(tensor, device="meta").stride()
