"""What changes with the iteration: the weight of the contrast and the learning rate."""

from __future__ import annotations

import math


def lambda_c(initial: float, iteration: int, total: int, *, alpha: float = -5.0) -> float:
    """Weight of the contrast, eq. (12) of the IJCV paper: initial * exp(alpha * (iteration / total)^2)."""
    return initial * math.exp(alpha * (iteration / total) ** 2)


def poly_lr(base: float, iteration: int, total: int, *, power: float = 0.9, floor: float = 0.0) -> float:
    """Polynomial decay of a learning rate: base * (1 - iteration / total)^power, never below `floor`."""
    return max(base * max(1.0 - iteration / total, 0.0) ** power, floor)
