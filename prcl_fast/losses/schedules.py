"""Schedules of loss weight and learning rate, computed on the device that counts the iterations."""

from __future__ import annotations

import torch
from torch import Tensor

from prcl_fast.ops.arguments import INTEGER, check_count, check_tensor


def lambda_c(initial: float, iteration: Tensor, total: int, *, alpha: float = -5.0) -> Tensor:
    """Weight of the contrast, eq. (12) of the IJCV paper: initial * exp(alpha * (iteration / total)^2).

    Args:
        iteration: integer scalar, on any device.
        total: iterations of the training, at least 1.
    Returns:
        float64 scalar on the same device.
    Raises:
        TypeError, ValueError: `iteration` or `total` does not fit.
    """
    _check(iteration, total)
    return initial * torch.exp(alpha * (iteration.double() / total) ** 2)


def poly_lr(base: float, iteration: Tensor, total: int, *, power: float = 0.9) -> Tensor:
    """Polynomial decay of a learning rate: base * (1 - iteration / total)^power, 0 from `total` on.

    Args:
        iteration: integer scalar, on any device.
        total: iterations of the training, at least 1.
    Returns:
        float64 scalar on the same device.
    Raises:
        TypeError, ValueError: `iteration` or `total` does not fit.
    """
    _check(iteration, total)
    return base * (1.0 - iteration.double() / total).clamp(min=0.0) ** power


def _check(iteration: Tensor, total: int) -> None:
    check_tensor("iteration", iteration, (), INTEGER)
    check_count("total", total)
