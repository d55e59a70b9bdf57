"""Pseudo-labels in Triton.

A program owns 512 neighbouring pixels of one output image. It finds their four neighbours once, then walks
over the classes: each logit is interpolated where it is needed, and updates the largest one so far, its class
and the sum of exp(logit - largest), whose inverse is the confidence. Nothing else is read or written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prcl_fast.kernels.interpolation import axis_scale, bilinear, corners
from prcl_fast.kernels.launch import device_of, grid_of

_BLOCK = 512


# Evaluation brings images of every size: none of these is worth a kernel of its own.
@triton.jit(
    do_not_specialize=["height", "width", "area_out", "width_out"],
    do_not_specialize_on_alignment=["stride_b", "stride_c", "stride_y", "stride_x"],
)
def _label_kernel(
    logits, label, confidence, num_classes, height, width, area_out, width_out, scale_y, scale_x,
    stride_b, stride_c, stride_y, stride_x, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < area_out
    at_00, at_01, at_10, at_11, fraction_y, fraction_x = corners(
        tl.where(inside, pixel, 0), height, width, width_out, scale_y, scale_x, stride_y, stride_x
    )
    plane = logits + image * stride_b
    largest = bilinear(plane, at_00, at_01, at_10, at_11, fraction_y, fraction_x)
    total = tl.full((BLOCK,), 1.0, tl.float32)
    best = tl.zeros((BLOCK,), tl.int32)
    for c in range(1, num_classes):
        plane += stride_c
        logit = bilinear(plane, at_00, at_01, at_10, at_11, fraction_y, fraction_x)
        higher = logit > largest
        ratio = tl.exp(-tl.abs(logit - largest))
        total = tl.where(higher, total * ratio + 1.0, total + ratio)
        best = tl.where(higher, c, best)
        largest = tl.where(higher, logit, largest)
    at = image * area_out + pixel
    tl.store(label + at, best.to(tl.uint8), mask=inside)
    tl.store(confidence + at, 1.0 / total, mask=inside)


def pseudo_label(logits: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Argmax (uint8) and maximum (float32) of the softmax of the upsampled logits, [B, H, W] each."""
    batch, num_classes, height_in, width_in = logits.shape
    label = torch.empty(batch, height, width, dtype=torch.uint8, device=logits.device)
    confidence = torch.empty(batch, height, width, dtype=torch.float32, device=logits.device)
    grid = grid_of(triton.cdiv(height * width, _BLOCK), batch)
    with device_of(logits):
        _label_kernel[grid](
            logits, label, confidence, num_classes, height_in, width_in, height * width, width,
            axis_scale(height_in, height), axis_scale(width_in, width),
            *logits.stride(), BLOCK=_BLOCK,
        )  # fmt: skip
    return label, confidence
