"""Philox-4x32-10, the counter-based generator behind every draw made on the device.

Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). Every backend gives the
same words, hence the same indices, bit for bit. The rules that an implementation must follow:

- `seed` is an int64 tensor [2] = (seed, step). Key = (low, high 32 bits of seed). Counter = (element,
  purpose, low 32 bits of step, high 32 bits of step); one call gives four 32-bit words w0, w1, w2, w3.
- `element` < 2^32 is the position of the drawn value in the op's output, `purpose` tells apart the uses of
  one (seed, step).
- bounded(hi, lo, n) = floor((hi * 2^32 + lo) * n / 2^64), for n <= 2^31: an integer in 0 .. n-1. Its
  deviation from uniform is below n / 2^64.

`sample_anchors`, `sample_negatives` and `philox_normal` beside this file turn the words into their draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

ANCHORS, NEGATIVES = 1, 2  # purposes of the two samplers

_LOW = 0xFFFFFFFF
_ROUNDS = 10
# The multipliers less 2^32: their product with a 32-bit word then fits into a signed 64-bit integer,
# and adding the word to the high half makes up for the difference.
_MULTIPLIER_0 = 0xD2511F53 - (1 << 32)
_MULTIPLIER_1 = 0xCD9E8D57 - (1 << 32)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds; counter, key and result are int64 tensors of 32-bit words that broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        high_0 = (product_0 >> 32) + c0
        high_1 = (product_1 >> 32) + c2
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, product_1 & _LOW, high_0 ^ c3 ^ k1, product_0 & _LOW
        k0 = (k0 + _WEYL_0) & _LOW
        k1 = (k1 + _WEYL_1) & _LOW
    return c0, c1, c2, c3


def philox_words(seed: Tensor, element: Tensor, purpose: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of each element, int64 tensors shaped like `element`."""
    key = (seed[0] & _LOW, (seed[0] >> 32) & _LOW)
    step = (seed[1] & _LOW, (seed[1] >> 32) & _LOW)
    return philox_4x32((element, torch.full_like(seed[0], int(purpose)), *step), key)


def bounded(high: Tensor, low: Tensor, n: Tensor) -> Tensor:
    """floor((high * 2^32 + low) * n / 2^64), exactly, for 0 <= n <= 2^31 (int64 tensors that broadcast)."""
    return (high * n + ((low * n) >> 32)) >> 32
