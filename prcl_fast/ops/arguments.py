"""Arguments of ops and losses: checks of shape, dtype and device, of values on the host only; layouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF = (torch.bfloat16, torch.float16)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
BOOL = (torch.bool,)

_MAX_PIXELS = 1 << 31
_MAX_ELEMENTS = 1 << 32


def check_tensor(
    name: str,
    value: Tensor,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype],
    like: tuple[str, Tensor] | None = None,
) -> None:
    """Checks one tensor argument.

    Args:
        shape: one entry per dimension, a size that must match or a name for a size that may be anything.
        dtypes: the dtypes allowed.
        like: name and value of the argument whose device must be the same.
    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: another shape or device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {allowed}; got {str(value.dtype).removeprefix('torch.')}")
    fits = value.dim() == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(shape, value.shape, strict=True)
    )
    if not fits:
        expected = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{expected}]; got {list(value.shape)}")
    if like is not None and value.device != like[1].device:
        raise ValueError(f"{name} is on {value.device} but {like[0]} is on {like[1].device}")


def check_features(mu: Tensor, var: Tensor) -> None:
    """mu and var [B, D, h, w]: floating, alike in shape and device, not empty.

    var has the dtype of mu or, beside bfloat16 or float16, is float32: what heads under autocast make.
    """
    check_tensor("mu", mu, ("B", "D", "h", "w"), FLOATING)
    beside = (mu.dtype, torch.float32) if mu.dtype in HALF else (mu.dtype,)
    check_tensor("var", var, mu.shape, beside, ("mu", mu))
    check_pixels("mu", mu.shape[0] * mu.shape[2] * mu.shape[3])


def check_pixels(name: str, pixels: int) -> None:
    """Flat pixel indices must be drawable: 0 < B*h*w < 2^31."""
    if not 0 < pixels < _MAX_PIXELS:
        raise ValueError(f"{name} must hold between 1 and 2^31 - 1 pixels; got {pixels}")


def check_count(name: str, value: int, *, least: int = 1) -> None:
    """An integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer; got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")


def check_number(name: str, value: float, least: float, most: float = math.inf) -> None:
    """A number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    if not least <= value <= most:
        limit = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
        raise ValueError(f"{name} must be {limit}; got {value}")


def check_temperature(name: str, value: float) -> None:
    """A number above 0."""
    check_number(name, value, 0.0)
    if value == 0:
        raise ValueError(f"{name} must be positive; got {value}")


def check_variance(name: str, value: Tensor) -> None:
    """Variances above 0, checked where the host can read them without waiting for a device.

    A nan passes: the trainer's guard reports a step that is not finite.
    """
    if not _is_readable_on_host(value) or value.numel() == 0:
        return
    smallest = float(value.detach().amin())
    if smallest <= 0:
        hint = "; a log-variance goes through exp() first" if smallest < 0 else ""
        raise ValueError(f"{name} must be positive; its smallest value is {smallest:g}{hint}")


def check_seed(seed: Tensor, like: tuple[str, Tensor] | None = None) -> None:
    """seed: int64 [2] = (seed, step)."""
    check_tensor("seed", seed, (2,), (torch.int64,), like)


def check_pixel_maps(
    name: str,
    features: Tensor,
    seed: Tensor,
    *,
    label: Tensor,
    valid: Tensor,
    confidence: Tensor | None = None,
) -> None:
    """label, valid and confidence [B, h, w] beside the features `name` [B, D, h, w], and the seed."""
    size, beside = (features.shape[0], *features.shape[2:]), (name, features)
    check_tensor("label", label, size, INTEGER, beside)
    check_tensor("valid", valid, size, BOOL, beside)
    if confidence is not None:
        check_tensor("confidence", confidence, size, FLOATING, beside)
    check_seed(seed, beside)


def check_draws(names: str, draws: int) -> None:
    """A draw's position in the output is a 32-bit word of the generator's counter."""
    if draws >= _MAX_ELEMENTS:
        raise ValueError(f"{names} must be below 2^32, the number of draws in one step; got {draws}")


def _is_readable_on_host(x: Tensor) -> bool:
    """Whether the host can read the values of x without waiting for a device."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
    )


def reduction_is_mean(reduction: str) -> bool:
    """True for "mean", False for "sum"; raises ValueError for anything else."""
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be sum or mean; got {reduction!r}")
    return reduction == "mean"


def contiguous(*arguments: Any) -> list[Any]:
    """The arguments, every tensor among them contiguous."""
    return [value.contiguous() if isinstance(value, Tensor) else value for value in arguments]


def rows_of(x: Tensor) -> Tensor:
    """[B, D, h, w] -> [B*h*w, D], contiguous: a view where x is channels_last and else a copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()
