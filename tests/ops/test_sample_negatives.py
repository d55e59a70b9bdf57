"""Negatives: their classes, their pixels, and the exact rule of the draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from prcl_fast.ops import ClassLists, class_lists, sample_negatives, use_backend
from prcl_fast.reference.philox import philox_4x32
from support.backends import run_everywhere

place = run_everywhere("sample_negatives")

C, A, N = 5, 6, 40
ONE = 1 << 31


def lists_of(label: Tensor, valid: Tensor, hard: Tensor, classes: int) -> ClassLists:
    """Made by the reference, where the tensors lie."""
    with use_backend("torch"):
        return class_lists(label, valid, hard, classes)


def scene() -> tuple[Tensor, Tensor, Tensor]:
    """Class 4 has no pixel, class 3 none that is valid."""
    generator = torch.Generator().manual_seed(0)
    label = torch.tensor([0, 1, 2, 3, -1])[torch.randint(0, 5, (2, 9, 7), generator=generator)]
    valid = (torch.rand(2, 9, 7, generator=generator) < 0.8) & (label != 3)
    probability = torch.rand(C, C, generator=generator) + 0.05
    probability.fill_diagonal_(0)
    return probability / probability.sum(1, keepdim=True), label, valid


def test_negatives_are_valid_pixels_of_other_classes() -> None:
    probability, label, valid = scene()
    probability.fill_diagonal_(0.5)  # must not matter
    index = sample_negatives(probability, label, valid, C, A, N, torch.tensor([1, 2]))
    assert index.shape == (C, A, N)
    assert index.dtype == torch.int64
    assert valid.flatten()[index].all()
    drawn = label.flatten()[index]
    for c in range(C):
        assert (drawn[c] != c).all()
        assert set(drawn[c].unique().tolist()) == {0, 1, 2} - {c}


def test_row_without_a_class_to_draw_gives_minus_one() -> None:
    probability, label, valid = scene()
    probability[0] = 0
    probability[1] = torch.tensor([0.0, 0.0, 0.0, 0.5, 0.5])  # only classes without a valid pixel
    probability[2] = torch.nan
    index = sample_negatives(probability, label, valid, C, A, N, torch.tensor([1, 2]))
    assert (index[:3] == -1).all()
    assert (index[3:] >= 0).all()
    assert (sample_negatives(probability, label, valid & False, C, A, N, torch.tensor([1, 2])) == -1).all()


def test_draws_follow_the_written_rule_bit_for_bit() -> None:
    probability, label, valid = scene()
    seed, step = (7 << 32) + 5, (2 << 32) + 11
    index = sample_negatives(probability, label, valid, C, A, N, torch.tensor([seed, step]))
    lists = [((label == k) & valid).flatten().nonzero()[:, 0].tolist() for k in range(C)]
    for c in range(C):
        weights = [
            0 if k == c or not lists[k] else int(probability[c, k].double().item() * ONE) for k in range(C)
        ]
        for element in range(0, A * N, 17):
            counter = tuple(map(torch.tensor, (c * A * N + element, 2, 11, 2)))
            w = [int(x) for x in philox_4x32(counter, (torch.tensor(5), torch.tensor(7)))]
            x = ((w[0] << 32 | w[1]) * sum(weights)) >> 64
            k = next(k for k in range(C) if sum(weights[: k + 1]) > x)
            expected = lists[k][((w[2] << 32 | w[3]) * len(lists[k])) >> 64]
            assert index[c, element // N, element % N] == expected


def test_classes_and_pixels_have_the_given_law_by_chi_squared() -> None:
    probability, label, valid = scene()
    index = sample_negatives(probability, label, valid, C, 20, 200, torch.tensor([3, 1])).flatten(1)
    pixels_of = torch.stack([((label == k) & valid).sum() for k in range(C)])
    for c in range(C):
        allowed = probability[c].double().clone()
        allowed[c] = 0
        allowed[pixels_of == 0] = 0
        allowed /= allowed.sum()
        per_pixel = (allowed / pixels_of.clamp(min=1))[label.flatten().clamp(min=0)] * (
            valid & (label >= 0)
        ).flatten()
        expected = (per_pixel * index.shape[1]).numpy()
        counts = np.bincount(index[c].numpy(), minlength=label.numel())
        assert counts[expected == 0].sum() == 0
        used = expected > 0
        statistic = ((counts[used] - expected[used]) ** 2 / expected[used]).sum()
        # Below 0.01 % of the law, for a fixed seed.
        assert chi2.sf(statistic, used.sum() - 1) > 1e-4


def test_rows_that_exceed_one_by_rounding_or_more_never_overflow() -> None:
    _, label, valid = scene()
    probability = torch.full((C, C), 1.0)
    index = sample_negatives(probability, label, valid, C, 20, 200, torch.tensor([3, 1]))
    assert ((index >= 0) & (index < label.numel())).all()
    # Cut at one: the first other class takes it all.
    assert (label.flatten()[index[0]] == 1).all()
    assert (label.flatten()[index[1:]] == 0).all()


def test_a_probability_next_to_zero_draws_next_to_nothing() -> None:
    _, label, valid = scene()
    probability = torch.zeros(C, C)
    probability[0, 1], probability[0, 2] = 1e-12, 1.0
    index = sample_negatives(probability, label, valid, C, 20, 200, torch.tensor([3, 1]))
    assert (label.flatten()[index[0]] == 2).all()


def test_weights_of_one_unit_are_drawn_evenly() -> None:
    """The smallest weights there are: every draw falls on an edge of the cumulative table."""
    _, label, valid = scene()
    index = sample_negatives(torch.full((C, C), 2.0**-31), label, valid, C, 20, 200, torch.tensor([3, 1]))
    share = (label.flatten()[index[0]] == 1).double().mean()
    assert set(label.flatten()[index[0]].unique().tolist()) == {1, 2}
    assert abs(share - 0.5) < 4 * 0.5 / 4000**0.5


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    from prcl_fast.reference import sample_negatives as reference

    probability, label, valid = scene()
    lists = lists_of(label, valid, valid, C)
    arguments = (probability, lists.valid_order, lists.valid_start, A, N, torch.tensor([1, 2]))
    whole = reference.sample_negatives(*arguments)
    monkeypatch.setitem(reference._CHUNK, "cpu", 37)
    assert torch.equal(whole, reference.sample_negatives(*arguments))


def test_given_lists_draw_the_same() -> None:
    probability, label, valid = scene()
    seed = torch.tensor([1, 2])
    lists = lists_of(label, valid, label == 0, C)
    expected = sample_negatives(probability, label, valid, C, A, N, seed)
    assert torch.equal(sample_negatives(probability, label, valid, C, A, N, seed, lists=lists), expected)


def test_wrong_arguments_are_named() -> None:
    probability, label, valid = scene()
    seed = torch.tensor([0, 0])
    with pytest.raises(ValueError, match="class_probability must have shape"):
        sample_negatives(probability[:, :-1], label, valid, C, A, N, seed)
    with pytest.raises(ValueError, match="num_negatives must be at least 1"):
        sample_negatives(probability, label, valid, C, A, 0, seed)
    with pytest.raises(ValueError, match=r"below 2\^32"):
        sample_negatives(probability, label, valid, C, 1 << 15, 1 << 15, seed)
    with pytest.raises(TypeError, match="valid must be bool"):
        sample_negatives(probability, label, valid.float(), C, A, N, seed)


def test_opcheck_and_compile() -> None:
    probability, label, valid = scene()
    seed = torch.tensor([4, 5])
    lists = lists_of(label, valid, valid, C)
    arguments = (probability, lists.valid_order, lists.valid_start, A, N, seed)
    torch.library.opcheck(torch.ops.prcl_fast.sample_negatives.default, arguments)
    compiled = torch.compile(sample_negatives, fullgraph=True, backend="aot_eager")
    expected = sample_negatives(probability, label, valid, C, A, N, seed)
    assert torch.equal(compiled(probability, label, valid, C, A, N, seed), expected)
