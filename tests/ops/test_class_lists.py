"""Class lists: their pixels, their order, and equal bits on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prcl_fast.ops import class_lists
from support.backends import run_everywhere

place = run_everywhere("class_lists")


def scene(pixels: tuple[int, int, int], classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels of all classes but the first, and some outside the range."""
    generator = torch.Generator().manual_seed(classes)
    label = torch.randint(1, classes + 2, pixels, generator=generator)
    label = torch.where(label > classes, torch.where(label % 2 == 0, -1, 255), label)
    valid = torch.rand(pixels, generator=generator) < 0.8
    return label, valid, torch.rand(pixels, generator=generator) < 0.5


def by_hand(label: Tensor, keep: Tensor, classes: int) -> tuple[list[int], list[int]]:
    order: list[int] = []
    start = [0]
    for c in range(classes):
        order += ((label == c) & keep).flatten().nonzero()[:, 0].tolist()
        start.append(len(order))
    return order + [-1] * (label.numel() - len(order)), start


@pytest.mark.parametrize(
    ("pixels", "classes"),
    [
        ((1, 1, 1), 1),
        ((2, 7, 5), 1),
        ((2, 7, 5), 6),
        ((1, 64, 33), 21),
        ((3, 79, 57), 40),
        ((1, 30, 30), 4096),
    ],
)
def test_each_class_owns_its_pixels_in_ascending_order(
    place: tuple[str, str], pixels: tuple[int, int, int], classes: int
) -> None:
    """On CUDA a block sorts 2048 pixels at a time, and 4096 classes need most of its shared memory."""
    if place == ("cpu", "triton") and classes == 4096:
        pytest.skip("the interpreter takes too long")
    label, valid, hard = scene(pixels, classes)
    got = class_lists(label, valid, hard, classes)
    for order, start, keep in (
        (got.valid_order, got.valid_start, valid),
        (got.hard_order, got.hard_start, valid & hard),
    ):
        assert order.dtype == start.dtype == torch.int32
        expected_order, expected_start = by_hand(label, keep, classes)
        assert order.tolist() == expected_order
        assert start.tolist() == expected_start


def test_a_class_of_long_runs_stays_in_order() -> None:
    """Many blocks, of which some are all one class and some have none that counts."""
    label = torch.arange(3).repeat_interleave(7000)[None, None]
    valid = (label != 1) | (torch.arange(21000) % 5 == 0)
    hard = torch.arange(21000)[None, None] % 2 == 0
    got = class_lists(label, valid, hard, 3)
    assert got.valid_order.tolist() == by_hand(label, valid, 3)[0]
    assert got.hard_order.tolist() == by_hand(label, valid & hard, 3)[0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_the_dtype_of_labels_does_not_matter(dtype: torch.dtype) -> None:
    label, valid, hard = scene((2, 7, 5), 6)
    expected = class_lists(label % 256, valid, hard, 6)
    got = class_lists((label % 256).to(dtype), valid.mT.contiguous().mT, hard, 6)
    assert torch.equal(got.valid_order, expected.valid_order)
    assert torch.equal(got.hard_order, expected.hard_order)


def test_no_valid_pixel_gives_empty_lists() -> None:
    label, valid, hard = scene((2, 7, 5), 6)
    got = class_lists(label, valid & False, hard, 6)
    assert not got.valid_start.any()
    assert not got.hard_start.any()
    assert (got.valid_order == -1).all()
    assert (got.hard_order == -1).all()


def test_wrong_arguments_are_named() -> None:
    label, valid, hard = scene((2, 7, 5), 6)
    with pytest.raises(TypeError, match="label must be int64"):
        class_lists(label.float(), valid, hard, 6)
    with pytest.raises(ValueError, match="valid must have shape"):
        class_lists(label, valid[:1], hard, 6)
    with pytest.raises(TypeError, match="hard must be bool"):
        class_lists(label, valid, hard.int(), 6)
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        class_lists(label, valid, hard, 0)
    with pytest.raises(ValueError, match="label must hold between 1 and"):
        class_lists(label[:0], valid[:0], hard[:0], 6)


def test_opcheck_and_compile() -> None:
    label, valid, hard = scene((2, 7, 5), 6)
    torch.library.opcheck(torch.ops.prcl_fast.class_lists.default, (label, valid, hard, 6))

    def counts(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        lists = class_lists(*arguments, 6)
        return lists.valid_start.diff(), lists.hard_start.diff()

    compiled = torch.compile(counts, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(label, valid, hard), counts(label, valid, hard), strict=True):
        assert torch.equal(got, expected)
