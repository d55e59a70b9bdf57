"""The generator of `prcl_fast.reference.philox` inside a Triton kernel; see there for the specification."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox_words(seed, element, PURPOSE: tl.constexpr):
    """Four uint32 words of each element, an int64 block of values below 2^32; seed: int64 [2] in memory."""
    c0 = element.to(tl.uint32)
    c1 = tl.full(c0.shape, PURPOSE, tl.uint32)
    step = tl.load(seed + 1)
    c2 = tl.zeros_like(c0) + step.to(tl.uint32)
    c3 = tl.zeros_like(c0) + (step >> 32).to(tl.uint32)
    return tl.philox(tl.load(seed), c0, c1, c2, c3, 10)


@triton.jit
def bounded(high, low, n):
    """floor((high * 2^32 + low) * n / 2^64) as int64, for uint32 words and int64 n in 0 .. 2^31."""
    n = n.to(tl.uint64)
    return ((high.to(tl.uint64) * n + ((low.to(tl.uint64) * n) >> 32)) >> 32).to(tl.int64)
