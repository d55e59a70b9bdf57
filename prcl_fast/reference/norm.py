"""The norm of a mean, as the score divides by it: never below MIN_NORM."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_NORM = 1e-12


def inverse_norm(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """1 / max(|x|, MIN_NORM) over one dimension, which goes, computed in `dtype`."""
    return torch.linalg.vector_norm(x, dim=dim, dtype=dtype).clamp(min=MIN_NORM).reciprocal()


def is_clamped(inverse_norm: Tensor) -> Tensor:
    """True where the norm was clamped: there it counts as a constant and has no derivative."""
    return inverse_norm >= torch.full_like(inverse_norm, MIN_NORM).reciprocal()
