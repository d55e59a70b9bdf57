"""Anchors: their pixels, their distribution, and the exact rule of the draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from prcl_fast.ops import ClassLists, class_lists, sample_anchors, use_backend
from prcl_fast.reference.philox import philox_4x32
from support.backends import run_everywhere

place = run_everywhere("sample_anchors")

C, A = 5, 64


def lists_of(label: Tensor, valid: Tensor, hard: Tensor, classes: int) -> ClassLists:
    """Made by the reference, where the tensors lie."""
    with use_backend("torch"):
        return class_lists(label, valid, hard, classes)


def scene(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Labels of a few classes, some outside the range; class 3 has no hard pixel and class 4 no pixel."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.tensor([0, 1, 2, 3, -1, 255])[torch.randint(0, 6, (2, 9, 7), generator=generator)]
    valid = torch.rand(2, 9, 7, generator=generator) < 0.8
    hard = (torch.rand(2, 9, 7, generator=generator) < 0.5) & (label != 3)
    return label, valid, hard


def test_anchors_are_valid_hard_pixels_of_their_class() -> None:
    label, valid, hard = scene()
    index = sample_anchors(label, valid, hard, C, A, torch.tensor([1, 2]))
    assert index.shape == (C, A)
    assert index.dtype == torch.int64
    for c in range(3):
        assert (label.flatten()[index[c]] == c).all()
        assert (valid & hard).flatten()[index[c]].all()


def test_class_without_a_hard_pixel_gives_minus_one() -> None:
    label, valid, hard = scene()
    index = sample_anchors(label, valid, hard, C, A, torch.tensor([1, 2]))
    assert (index[3:] == -1).all()
    assert (sample_anchors(label, valid & False, hard, C, A, torch.tensor([1, 2])) == -1).all()


def test_draws_follow_the_written_rule_bit_for_bit() -> None:
    label, valid, hard = scene()
    seed, step = (7 << 32) + 5, (2 << 32) + 11
    index = sample_anchors(label, valid, hard, C, A, torch.tensor([seed, step]))
    for c in range(3):
        pixels = [
            i for i in range(label.numel()) if (label.flatten()[i] == c and (valid & hard).flatten()[i])
        ]
        for a in range(0, A, 9):
            counter = tuple(map(torch.tensor, (c * A + a, 1, 11, 2)))
            w0, w1, _, _ = (int(w) for w in philox_4x32(counter, (torch.tensor(5), torch.tensor(7))))
            assert index[c, a] == pixels[((w0 << 32 | w1) * len(pixels)) >> 64]


def test_draws_are_uniform_over_the_class_by_chi_squared() -> None:
    label, valid, hard = scene()
    drawn = torch.cat(
        [sample_anchors(label, valid, hard, C, 2000, torch.tensor([9, step])) for step in range(4)], dim=1
    )
    for c in range(3):
        pixels = ((label == c) & valid & hard).flatten().sum().item()
        counts = np.bincount(drawn[c].numpy(), minlength=label.numel())
        expected = 8000 / pixels
        statistic = ((counts[counts > 0] - expected) ** 2 / expected).sum()
        assert (counts > 0).sum() == pixels
        # Below 0.01 % of the law, for a fixed seed.
        assert chi2.sf(statistic, pixels - 1) > 1e-4


def test_steps_and_seeds_draw_differently_and_label_dtype_does_not_matter() -> None:
    label, valid, hard = scene()
    base = sample_anchors(label, valid, hard, C, A, torch.tensor([1, 2]))
    assert torch.equal(base, sample_anchors(label.to(torch.uint8), valid, hard, C, A, torch.tensor([1, 2])))
    assert torch.equal(base, sample_anchors(label.to(torch.int16), valid, hard, C, A, torch.tensor([1, 2])))
    for other in ([1, 3], [2, 2]):
        assert (sample_anchors(label, valid, hard, C, A, torch.tensor(other)) != base)[:3].any(1).all()


def test_given_lists_draw_the_same() -> None:
    label, valid, hard = scene()
    seed = torch.tensor([1, 2])
    lists = lists_of(label, valid, hard, C)
    expected = sample_anchors(label, valid, hard, C, A, seed)
    assert torch.equal(sample_anchors(label, valid, hard, C, A, seed, lists=lists), expected)
    whole = sample_anchors(label, valid, valid, C, A, seed)
    assert torch.equal(sample_anchors(label, valid, valid, C, A, seed, lists=lists.with_all_hard()), whole)
    assert not torch.equal(whole, expected)


def test_wrong_arguments_are_named() -> None:
    label, valid, hard = scene()
    seed = torch.tensor([0, 0])
    with pytest.raises(ValueError, match="hard must have shape"):
        sample_anchors(label, valid, hard[:1], C, A, seed)
    with pytest.raises(TypeError, match="valid must be bool"):
        sample_anchors(label, valid.long(), hard, C, A, seed)
    with pytest.raises(TypeError, match="label must be"):
        sample_anchors(label.float(), valid, hard, C, A, seed)
    with pytest.raises(ValueError, match="num_anchors must be at least 1"):
        sample_anchors(label, valid, hard, C, 0, seed)
    with pytest.raises(ValueError, match=r"below 2\^32"):
        sample_anchors(label, valid, hard, 1 << 16, 1 << 16, seed)
    lists = lists_of(label, valid, hard, C + 1)
    with pytest.raises(ValueError, match=r"lists.valid_start must have shape \[6\]; got \[7\]"):
        sample_anchors(label, valid, hard, C, A, seed, lists=lists)
    with pytest.raises(TypeError, match="lists must be ClassLists; got tuple"):
        sample_anchors(label, valid, hard, C, A, seed, lists=(label, valid))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="seed must be int64"):
        sample_anchors(label, valid, hard, C, A, seed.int())


def test_opcheck_and_compile() -> None:
    label, valid, hard = scene()
    seed = torch.tensor([4, 5])
    lists = lists_of(label, valid, hard, C)
    arguments = (lists.hard_order, lists.hard_start, A, seed)
    torch.library.opcheck(torch.ops.prcl_fast.sample_anchors.default, arguments)
    compiled = torch.compile(sample_anchors, fullgraph=True, backend="aot_eager")
    expected = sample_anchors(label, valid, hard, C, A, seed)
    assert torch.equal(compiled(label, valid, hard, C, A, seed), expected)
