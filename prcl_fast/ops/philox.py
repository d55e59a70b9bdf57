"""Normal numbers that are a function of (seed, step, purpose), drawn on the seed's device."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from prcl_fast.ops._arguments import check_count, check_draws, check_seed
from prcl_fast.reference import philox
from prcl_fast.reference.philox import Purpose

__all__ = ["Purpose", "philox_normal"]


def philox_normal(seed: Tensor, shape: Sequence[int], purpose: Purpose) -> Tensor:
    """Standard normal numbers from Philox-4x32-10, one call of the generator each.

    Plain PyTorch on every device; equal between devices up to the rounding of log and cos.

    Args:
        seed: int64 [2] = (seed, step).
        shape: of the result.
        purpose: what the numbers are for; two purposes are independent.
    Returns:
        float32 of that shape, on the seed's device.
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range; the message names it.
    """
    check_seed(seed)
    for size in shape:
        check_count("shape", size, least=0)
    check_draws("shape", math.prod(shape))
    return philox.philox_normal(seed, tuple(shape), purpose)
