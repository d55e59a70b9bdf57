"""Normal numbers in Triton: a program draws a block of them, in float64 as the reference does."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from prcl_fast.kernels.launch import device_of
from prcl_fast.kernels.philox import philox_words

_BLOCK = 256
_UNIT = tl.constexpr(2.0**-32)
_ANGLE = tl.constexpr(2.0 * math.pi * 2.0**-32)


@triton.jit
def _normal_kernel(seed, out, count, PURPOSE: tl.constexpr, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w0, w1, _, _ = philox_words(seed, element, PURPOSE)
    radius = tl.sqrt(-2.0 * tl.log((w0.to(tl.float64) + 1.0) * _UNIT))
    value = radius * tl.cos(w1.to(tl.float64) * _ANGLE)
    tl.store(out + element, value.to(tl.float32), mask=element < count)


def philox_normal(seed: Tensor, count: int, purpose: int) -> Tensor:
    """float32 [count] for seed, int64 [2] = (seed, step)."""
    out = seed.new_empty(count, dtype=torch.float32)
    if count > 0:
        with device_of(seed):
            _normal_kernel[(triton.cdiv(count, _BLOCK),)](seed, out, count, PURPOSE=purpose, BLOCK=_BLOCK)
    return out
