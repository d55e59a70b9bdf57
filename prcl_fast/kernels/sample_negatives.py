"""Negatives in Triton.

A program draws a block of negatives of one anchor class. It makes the class's cumulative weights, whole
numbers, from its row of the probabilities, and keeps them in registers; a negative's class is the number of
sums that do not exceed its draw, found by comparing with all of them, and its pixel is the one read from the
class's list.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prcl_fast.kernels.launch import device_of, grid_of
from prcl_fast.kernels.philox import bounded, philox_words
from prcl_fast.reference.philox import NEGATIVES

_PURPOSE = tl.constexpr(NEGATIVES)
_ONE = tl.constexpr(1 << 31)
_COMPARISONS = 4096  # of one program at a time: draws times classes


@triton.jit
def _draw_kernel(
    seed, probability, order, start, out, num_classes, draws, CLASSES: tl.constexpr, BLOCK: tl.constexpr
):
    c = tl.program_id(1).to(tl.int64)
    other = tl.arange(0, CLASSES)
    inside = other < num_classes
    count = tl.load(start + other + 1, mask=inside, other=0) - tl.load(start + other, mask=inside, other=0)
    p = tl.load(probability + c * num_classes + other, mask=inside & (other != c) & (count > 0), other=0.0)
    p = tl.where(p > 0.0, tl.where(p < 1.0, p, 1.0), 0.0)  # NaN counts as 0
    one = tl.full((CLASSES,), _ONE, tl.int64)
    cumulative = tl.cumsum((p * one.to(tl.float64)).to(tl.int64), 0)
    cumulative = tl.where(cumulative < one, cumulative, one)
    total = tl.max(cumulative, 0)

    draw = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    element = c * draws + draw
    w0, w1, w2, w3 = philox_words(seed, element, _PURPOSE)
    x = bounded(w0, w1, total)
    drawn_class = tl.sum((cumulative[None, :] <= x[:, None]).to(tl.int32), 1)
    some = (draw < draws) & (total > 0)
    first = tl.load(start + drawn_class, mask=some, other=0).to(tl.int64)
    last = tl.load(start + drawn_class + 1, mask=some, other=0)
    pixel = tl.load(order + first + bounded(w2, w3, last - first), mask=some, other=-1)
    tl.store(out + element, pixel.to(tl.int64), mask=draw < draws)


def sample_negatives(
    class_probability: Tensor,
    order: Tensor,
    start: Tensor,
    num_anchors: int,
    num_negatives: int,
    seed: Tensor,
) -> Tensor:
    """[C, A, N] int64 flat indices from the class lists of the valid pixels, -1 where none can be drawn."""
    num_classes = class_probability.shape[0]
    out = torch.empty(num_classes, num_anchors, num_negatives, dtype=torch.int64, device=order.device)
    draws = num_anchors * num_negatives
    padded = triton.next_power_of_2(num_classes)
    block = max(16, min(256, _COMPARISONS // padded))
    grid = grid_of(triton.cdiv(draws, block), num_classes)
    with device_of(order):
        _draw_kernel[grid](
            seed, class_probability, order, start, out, num_classes, draws, CLASSES=padded, BLOCK=block
        )
    return out
