"""Weights in autocast's low precision, cast by one operation per part of a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def autocast_weights(parts: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Within the block, convolutions and linear layers hold their weights cast to autocast's type.

    Autocast casts each weight, and later its gradient, by an operation of its own: about 240 launches for a
    ResNet-101 and its teacher. Here all weights of a part are cast together, once per pass. Values and the
    gradients of one pass are bitwise the same. Gradients of several passes in one autocast context are added
    in float32; autocast, which caches its casts, adds them in low precision. A part's gradients reach its
    parameters together, so that parts should be about as large as the buckets of DistributedDataParallel.

    Outside autocast it does nothing. It is not needed under torch.compile, which merges the casts.

    Args:
        parts: disjoint parts of a network.
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
                # Attribute lookup finds it before the registered parameter of the same name.
                module.__dict__[name] = value
                changed.append((module, name))
        yield
    finally:
        for module, name in changed:
            del module.__dict__[name]


def _places(part: nn.Module) -> list[tuple[nn.Module, str]]:
    """Modules and parameter names of a part that autocast casts to low precision."""
    return [
        (module, name)
        for module in part.modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dtype == torch.float32
    ]


class _Cast(torch.autograd.Function):
    """Tensors -> copies in another floating-point type."""

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
