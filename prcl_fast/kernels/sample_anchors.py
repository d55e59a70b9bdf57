"""Anchors in Triton: a program draws a block of one class's anchors from the class's list of pixels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prcl_fast.kernels.launch import device_of, grid_of
from prcl_fast.kernels.philox import bounded, philox_words
from prcl_fast.reference.philox import ANCHORS

_PURPOSE = tl.constexpr(ANCHORS)
_BLOCK = 256


@triton.jit
def _draw_kernel(seed, order, start, out, num_anchors, BLOCK: tl.constexpr):
    c = tl.program_id(0).to(tl.int64)
    anchor = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(start + c).to(tl.int64)
    count = tl.load(start + c + 1) - first
    element = c * num_anchors + anchor
    w0, w1, _, _ = philox_words(seed, element, _PURPOSE)
    inside = anchor < num_anchors
    pixel = tl.load(order + first + bounded(w0, w1, count), mask=inside & (count > 0), other=-1)
    tl.store(out + element, pixel.to(tl.int64), mask=inside)


def sample_anchors(order: Tensor, start: Tensor, num_anchors: int, seed: Tensor) -> Tensor:
    """[C, A] int64 flat indices from the class lists of the hard pixels, -1 where a class has none."""
    num_classes = start.numel() - 1
    out = torch.empty(num_classes, num_anchors, dtype=torch.int64, device=order.device)
    grid = grid_of(num_classes, triton.cdiv(num_anchors, _BLOCK))
    with device_of(order):
        _draw_kernel[grid](seed, order, start, out, num_anchors, BLOCK=_BLOCK)
    return out
