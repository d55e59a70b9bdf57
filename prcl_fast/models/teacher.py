"""The EMA teacher: an exponential moving average of the student."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from prcl_fast.models.network import NetworkOutput, SegmentationNetwork


class EMATeacher(nn.Module):
    """An exponential moving average of the student, without gradients.

    Parameters and floating-point buffers (BN statistics) are averaged; integer buffers are copied. The
    teacher is always in evaluation mode, so that its BN uses the averaged statistics. (The authors' public
    code runs it in training mode and does not average buffers.)

    Args:
        student: the network to average; not compiled, not wrapped.
        decay: the final decay, from the iteration at which 1 - 1 / (iteration + 1) exceeds it.

    Attributes:
        network: the averaged network, for evaluation and export.
    """

    def __init__(self, student: SegmentationNetwork, decay: float = 0.99) -> None:
        super().__init__()
        self.network = copy.deepcopy(student).requires_grad_(False).eval()
        self.decay = decay
        # In a tuple, so that the student is no submodule and its weights are not part of the teacher's state.
        self._student = (student,)
        self._flat: tuple[FlatState, FlatState] | None = None

    def train(self, mode: bool = True) -> EMATeacher:
        """No effect: the teacher stays in evaluation mode."""
        return self

    @torch.no_grad()
    def forward(self, x: Tensor, *, representations: bool = False) -> NetworkOutput:
        """Output of the averaged network for images [B, 3, H, W], by default without representations."""
        return self.network(x, representations=representations)

    def lay_out_flat(self) -> None:
        """Moves the floating-point state of both networks into one tensor each, for a fast `update`.

        `update` calls this if needed. Called before compilation or graph capture, it keeps the addresses of
        the tensors from changing afterwards.
        """
        self._flat = FlatState(self.network), FlatState(self._student[0])

    @torch.no_grad()
    def update(self, iteration: Tensor) -> None:
        """Moves towards the student with decay min(1 - 1 / (iteration + 1), decay); iteration 0 copies it.

        Args:
            iteration: integer scalar on the networks' device, the number of earlier updates.
        """
        if self._flat is None or not self._flat[0].holds(self.network):
            self.lay_out_flat()
        assert self._flat is not None
        teacher, student = self._flat
        decay = (1.0 - 1.0 / (iteration.double() + 1.0)).clamp(max=self.decay)
        teacher.values.lerp_(student.values, (1.0 - decay).to(teacher.values.dtype))
        torch._foreach_copy_(teacher.others, student.others)


_ALIGNMENT = 64  # elements; as PyTorch's allocators, for vector loads and cuDNN


class FlatState:
    """The floating-point parameters and buffers of a network as views of one tensor.

    Each keeps its identity, values, shape and strides. Moving the network to another device or type ends
    this: see `holds`.

    Attributes:
        values: [N], of the network's floating-point type, with zeros between the views.
        others: buffers of other types.

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
        """Whether the state of `network` still lies in `values`."""
        return next(network.parameters()).data_ptr() == self.values.data_ptr()


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of a tensor without gaps; for others, those of a contiguous copy."""
    return torch.empty_like(tensor, device="meta").stride()
