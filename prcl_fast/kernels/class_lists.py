"""The pixels of each class as ranges of one list: a stable counting sort.

A program owns a block of pixels in both kernels. The first counts the block's pixels of each class, the
valid ones and those of them that are hard, into a table [2, C, blocks]; the running sums of the two halves
are where each block's pixels of each class begin in the two lists. The second writes the pixels there, at
their rank among the block's pixels of that class, so that each class's pixels stand in ascending order. Both
walk over the classes: a label is read twice in all. Whole numbers only, no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prcl_fast.kernels.launch import device_of

_BLOCK = 1024


@triton.jit
def _count_kernel(label, valid, hard, table, pixels, blocks, num_classes, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    owner, is_hard, _ = _classes(label, valid, hard, block, pixels, num_classes, BLOCK)
    table += block
    for c in range(0, num_classes):
        member = owner == c
        tl.store(table, tl.sum(member.to(tl.int32)))
        tl.store(table + num_classes * blocks, tl.sum((member & is_hard).to(tl.int32)))
        table += blocks


@triton.jit
def _scatter_kernel(
    label, valid, hard, begin, valid_order, valid_start, hard_order, hard_start, pixels, blocks, num_classes,
    BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    owner, is_hard, pixel = _classes(label, valid, hard, block, pixels, num_classes, BLOCK)
    begin += block
    for c in range(0, num_classes):
        member = owner == c
        _place(member, pixel, begin, valid_order, valid_start + c, block, blocks)
        _place(
            member & is_hard, pixel, begin + num_classes * blocks, hard_order, hard_start + c, block, blocks
        )
        begin += blocks


@triton.jit
def _place(member, pixel, begin, order, start, block, blocks):
    """Writes a class's pixels of the block; the first block writes its start too, the last its end."""
    first = tl.load(begin)
    rank = tl.cumsum(member.to(tl.int32), 0) - 1
    tl.store(order + first + rank, pixel.to(tl.int32), mask=member)
    tl.store(start, first.to(tl.int32), mask=block == 0)
    tl.store(start + 1, (first + tl.sum(member.to(tl.int32), 0)).to(tl.int32), mask=block == blocks - 1)


@triton.jit
def _classes(label, valid, hard, block, pixels, num_classes, BLOCK: tl.constexpr):
    """The class of each pixel of the block, or -1, whether it is hard, and the pixel."""
    pixel = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = tl.load(valid + pixel, mask=pixel < pixels, other=0) != 0
    is_hard = tl.load(hard + pixel, mask=pixel < pixels, other=0) != 0
    value = tl.load(label + pixel, mask=kept, other=0).to(tl.int64)
    return tl.where(kept & (value >= 0) & (value < num_classes), value, -1).to(tl.int32), is_hard, pixel


def class_lists(
    label: Tensor, valid: Tensor, hard: Tensor, num_classes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sorts the valid pixels, and those of them that are hard, by class.

    Args:
        label: [B, h, w] integer, contiguous; outside 0 .. num_classes - 1 means "none".
        valid, hard: [B, h, w] bool, contiguous.
    Returns:
        order [B*h*w] and start [C + 1] of the valid pixels, and both of the hard ones, all int32: class c
        owns order[start[c] : start[c + 1]], ascending; behind the last class the order is -1.
    """
    pixels = label.numel()
    blocks = triton.cdiv(pixels, _BLOCK)
    table = torch.empty(2, num_classes * blocks, dtype=torch.int32, device=label.device)
    orders = [torch.full((pixels,), -1, dtype=torch.int32, device=label.device) for _ in range(2)]
    starts = [torch.empty(num_classes + 1, dtype=torch.int32, device=label.device) for _ in range(2)]
    masks = valid.view(torch.uint8), hard.view(torch.uint8)
    with device_of(label):
        _count_kernel[(blocks,)](label, *masks, table, pixels, blocks, num_classes, BLOCK=_BLOCK)
        begin = table.cumsum(1) - table
        _scatter_kernel[(blocks,)](
            label, *masks, begin, orders[0], starts[0], orders[1], starts[1], pixels, blocks, num_classes,
            BLOCK=_BLOCK,
        )  # fmt: skip
    return orders[0], starts[0], orders[1], starts[1]
