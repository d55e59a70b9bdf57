"""Weights in autocast's low precision, cast by one operation for each part of a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def autocast_weights(parts: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Within the block, convolutions and linear layers hold the weights that autocast would make of theirs.

    Autocast casts each weight, and later its gradient, by an operation of its own: some 240 launches for a
    ResNet-101 and its teacher. Here all weights of a part are cast together, once a pass. Values are the same
    bits, and so are the gradients of one pass. Those of several passes within one autocast context are added
    in float32, where autocast, which keeps its casts, adds them in the low precision. A part's gradients
    reach its parameters when all of them are there, so that parts should be about as large as the buckets of
    DistributedDataParallel.

    Does nothing outside autocast. A network that is being compiled goes without: the compiler merges casts.

    Args:
        parts: of a network, disjoint.
        device: of the network.
    """
    kind = device.type
    has_autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if not has_autocast:
        yield
        return
    dtype = torch.get_autocast_dtype(kind)
    changed = []
    try:
        for part in parts:
            places = _places(part)
            cast = _Cast.apply(dtype, *(getattr(module, name) for module, name in places)) if places else ()
            for (module, name), value in zip(places, cast, strict=True):
                # Found before the parameter of that name, which stays registered.
                module.__dict__[name] = value
                changed.append((module, name))
        yield
    finally:
        for module, name in changed:
            del module.__dict__[name]


def _places(part: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules of a part whose products autocast computes in low precision, with their parameters."""
    return [
        (module, name)
        for module in part.modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dtype == torch.float32
    ]


class _Cast(torch.autograd.Function):
    """Tensors -> the same in another floating-point type."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[0].dtype
        return tuple(_cast(tensors, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        cast = iter(_cast([gradient for gradient in gradients if gradient is not None], ctx.dtype))
        return None, *(None if gradient is None else next(cast) for gradient in gradients)


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    made = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if made:
        torch._foreach_copy_(made, list(tensors))
    return made
