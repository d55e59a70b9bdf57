"""Normal numbers that are a function of (seed, step, purpose), drawn on the seed's device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from prcl_fast.ops.arguments import check_count, check_draws, check_seed, contiguous
from prcl_fast.ops.registry import define_op
from prcl_fast.reference import philox
from prcl_fast.reference import philox_normal as reference


class Purpose(IntEnum):
    """Purpose of a draw, a word of the generator's counter: purposes of one (seed, step) are independent."""

    ANCHORS = philox.ANCHORS
    NEGATIVES = philox.NEGATIVES
    VIRTUAL_NEGATIVES = 3
    ACTIVATED_PROTOTYPE = 4


def philox_normal(seed: Tensor, shape: Sequence[int], purpose: Purpose) -> Tensor:
    """Standard normal numbers from Philox-4x32-10, one call of the generator each.

    Equal between devices and backends up to the rounding of log and cos.

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
    count = math.prod(shape)
    check_draws("shape", count)
    return _op(seed, count, int(purpose)).reshape(tuple(shape))


def _fake(seed: Tensor, count: int, purpose: int) -> Tensor:
    return seed.new_empty((count,), dtype=torch.float32)


# Registered, and so not traced into compiled graphs: compiled by inductor for a CPU (PyTorch 2.13), the
# reference's generator gives other words.
_op = define_op(reference.philox_normal, fake=_fake, prepared=contiguous)
