"""The pixels of each class as ranges of one list: a stable counting sort.

A program owns a block of pixels in both kernels. The first counts the block's pixels of each class, into a
table [C, blocks]; the running sum of the table is where each block's pixels of each class begin. The second
writes the pixels there, at their rank among the block's pixels of that class, so that each class's pixels
stand in ascending order. Both walk over the classes: a label is read twice in all. Whole numbers only, no
atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prcl_fast.kernels.launch import device_of

_BLOCK = 1024


@triton.jit
def _count_kernel(label, keep, table, pixels, blocks, num_classes, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    owner, _ = _classes(label, keep, block, pixels, num_classes, BLOCK)
    table += block
    for c in range(0, num_classes):
        tl.store(table, tl.sum((owner == c).to(tl.int32)))
        table += blocks


@triton.jit
def _scatter_kernel(label, keep, begin, order, pixels, blocks, num_classes, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    owner, pixel = _classes(label, keep, block, pixels, num_classes, BLOCK)
    begin += block
    for c in range(0, num_classes):
        member = owner == c
        rank = tl.cumsum(member.to(tl.int32), 0) - 1
        tl.store(order + tl.load(begin) + rank, pixel.to(tl.int32), mask=member)
        begin += blocks


@triton.jit
def _classes(label, keep, block, pixels, num_classes, BLOCK: tl.constexpr):
    """The class of each pixel of the block, or -1, and the pixel."""
    pixel = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = tl.load(keep + pixel, mask=pixel < pixels, other=0) != 0
    value = tl.load(label + pixel, mask=kept, other=0).to(tl.int64)
    return tl.where(kept & (value >= 0) & (value < num_classes), value, -1).to(tl.int32), pixel


def class_lists(label: Tensor, keep: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the kept pixels by class.

    Args:
        label: [B, h, w] integer, contiguous; outside 0 .. num_classes - 1 means "none".
        keep: [B, h, w] bool, contiguous.
    Returns:
        order [B*h*w] int32, start [C], end [C] int64: class c owns order[start[c] : end[c]], ascending. What
        follows the last class is not written.
    """
    pixels = label.numel()
    blocks = triton.cdiv(pixels, _BLOCK)
    table = torch.empty(num_classes, blocks, dtype=torch.int32, device=label.device)
    order = torch.empty(pixels, dtype=torch.int32, device=label.device)
    keep = keep.view(torch.uint8)
    with device_of(label):
        _count_kernel[(blocks,)](label, keep, table, pixels, blocks, num_classes, BLOCK=_BLOCK)
        end = table.flatten().cumsum(0).view_as(table)
        begin = end - table
        _scatter_kernel[(blocks,)](label, keep, begin, order, pixels, blocks, num_classes, BLOCK=_BLOCK)
    return order, begin[:, 0].contiguous(), end[:, -1].contiguous()
