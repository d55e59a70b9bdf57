"""Philox-4x32-10, the counter-based generator behind every draw made on the device.

Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). Every backend gives the
same words, hence the same indices, bit for bit. The rules that an implementation must follow:

- `seed` is an int64 tensor [2] = (seed, step). Key = (low, high 32 bits of seed). Counter = (element,
  purpose, low 32 bits of step, high 32 bits of step); one call gives four 32-bit words w0, w1, w2, w3.
- `element` < 2^32 is the position of the drawn value in the op's output, `purpose` a constant of `Purpose`.
- bounded(hi, lo, n) = floor((hi * 2^32 + lo) * n / 2^64), for n <= 2^31: an integer in 0 .. n-1. Its
  deviation from uniform is below n / 2^64.
- Anchors: element = c * A + a; index = list_c[bounded(w0, w1, n_c)], where list_c holds the class's n_c valid
  and hard pixels, as flat indices into [B, h, w], ascending. n_c = 0 gives -1.
- Negatives: element = (c * A + a) * N + n. The class comes from (w0, w1), the pixel from (w2, w3):
  weights q[c, k] = floor(p[c, k] * 2^31) in float64 with p clamped to [0, 1] and NaN taken as 0, and q[c, k]
  = 0 where k = c or where class k has no valid pixel; Q[c, k] = min(q[c, 0] + ... + q[c, k], 2^31); T = Q[c,
  C-1]; k = number of values of Q[c, :] that are <= bounded(w0, w1, T); index = list_k[bounded(w2, w3, n_k)],
  where list_k holds the class's n_k valid pixels, ascending. T = 0 gives -1.
- Normal numbers (virtual negatives): element = flat position in the output; Box-Muller,
  sqrt(-2 log((w0 + 1) / 2^32)) * cos(2 pi w1 / 2^32). Equal between devices up to the rounding of log and cos
  only.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_ROUNDS = 10
# The multipliers less 2^32: their product with a 32-bit word then fits into a signed 64-bit integer,
# and adding the word to the high half makes up for the difference.
_MULTIPLIER_0 = 0xD2511F53 - (1 << 32)
_MULTIPLIER_1 = 0xCD9E8D57 - (1 << 32)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85


class Purpose(IntEnum):
    """What a draw is for: the second counter word, so that two uses of one (seed, step) are independent."""

    ANCHORS = 1
    NEGATIVES = 2
    VIRTUAL_NEGATIVES = 3
    ACTIVATED_PROTOTYPE = 4


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox-4x32.

    Args:
        counter: four int64 tensors of values in 0 .. 2^32 - 1, of shapes that broadcast together.
        key: two such tensors.
    Returns:
        four int64 tensors of values in 0 .. 2^32 - 1.
    """
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


def philox_words(seed: Tensor, element: Tensor, purpose: Purpose) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of each element.

    Args:
        seed: int64 [2] = (seed, step).
        element: int64, any shape, values in 0 .. 2^32 - 1.
        purpose: what the draw is for.
    Returns:
        four int64 tensors shaped like `element`, values in 0 .. 2^32 - 1.
    """
    key = (seed[0] & _LOW, (seed[0] >> 32) & _LOW)
    step = (seed[1] & _LOW, (seed[1] >> 32) & _LOW)
    return philox_4x32((element, torch.full_like(seed[0], int(purpose)), *step), key)


def bounded(high: Tensor, low: Tensor, n: Tensor) -> Tensor:
    """floor((high * 2^32 + low) * n / 2^64), exactly, for 0 <= n <= 2^31 (int64 tensors that broadcast)."""
    return (high * n + ((low * n) >> 32)) >> 32


def philox_normal(seed: Tensor, count: int, purpose: int) -> Tensor:
    """`count` standard normal numbers, float32, a function of (seed, step, purpose) alone."""
    element = torch.arange(count, device=seed.device)
    w0, w1, _, _ = philox_words(seed, element, Purpose(purpose))
    radius = torch.sqrt(-2.0 * torch.log((w0 + 1).double() * 2.0**-32))
    angle = w1.double() * (2.0 * math.pi * 2.0**-32)
    return (radius * torch.cos(angle)).float()
