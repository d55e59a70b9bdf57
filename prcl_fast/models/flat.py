"""A network's state in one allocation, so that what treats every number alike is one operation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
