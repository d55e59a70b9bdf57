"""Losses of PPS against plain transcriptions of eq. (7), (9) and (10)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prcl_fast.losses import odds_logits, one_prototype_per_class, prototypical_contrast
from support.plain_pps import CLOSE, SEED, C, D, K, N, draw, plain_contrast


def contrast(features: Tensor, prototype: Tensor, valid: Tensor, **settings: Any) -> Tensor:
    given = {"tau": 0.3, "num_anchors": 6, "num_negatives": 5, "normalize": False} | settings
    return prototypical_contrast(features, prototype, valid, K, SEED, **given).loss


def pixels_of_prototypes() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    prototype = torch.randint(K - 1, (2, 4, 5), generator=generator)  # the last prototype is absent
    valid = torch.rand(2, 4, 5, generator=generator) < 0.8
    return 0.5 * draw(2, D, 4, 5), prototype, valid


@pytest.mark.parametrize("normalize", [False, True])
def test_contrast_is_between_pixels_that_share_a_prototype_eq_7(normalize: bool) -> None:
    features, prototype, valid = pixels_of_prototypes()
    features.requires_grad_()
    loss = contrast(features, prototype, valid, normalize=normalize)
    embedded = features / features.square().sum(1, keepdim=True).sqrt() if normalize else features
    expected = plain_contrast(embedded, prototype, valid, SEED, 0.3, 6, 5)
    torch.testing.assert_close(loss.double(), expected, **CLOSE)
    got, want = (torch.autograd.grad(value, features)[0] for value in (loss, expected))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert want.any()


def test_contrast_has_negatives_of_the_same_class_and_of_every_other_prototype_alike() -> None:
    # Prototypes 0 and 1 belong to one class; 2 has nine in ten of the other pixels.
    prototype = torch.full((1, 20, 20), 2)
    prototype[:, 0, :10], prototype[:, 0, 10:] = 0, 1
    features = torch.nn.functional.one_hot(prototype, 3).movedim(-1, 1).double()
    # Scores are 1 / tau for the positive and 0 for negatives: the loss counts them alone ...
    expected = math.log1p(1000 * math.exp(-1 / 0.5))
    valid = torch.ones_like(prototype, dtype=torch.bool)
    settings: dict[str, Any] = {"tau": 0.5, "num_anchors": 50, "num_negatives": 1000}
    assert float(contrast(features, prototype, valid, **settings)) == pytest.approx(expected, rel=1e-5)
    # ... and if prototype 1's pixels equal those of 0, about half of 0's negatives equal them.
    features[:, 0] += features[:, 1]
    features[:, 1] = 0
    alike = contrast(features, prototype, valid, **settings)
    pair = math.log1p(500 + 500 * math.exp(-1 / 0.5))
    assert float(alike) == pytest.approx((2 * pair + expected) / 3, rel=0.01)


def test_contrast_is_at_chance_where_all_pixels_are_one() -> None:
    _, prototype, valid = pixels_of_prototypes()
    loss = contrast(torch.ones(2, D, 4, 5), prototype, valid, num_negatives=9)
    assert float(loss) == pytest.approx(math.log(10))


@pytest.mark.parametrize("known", [0, 1])
def test_contrast_without_a_pair_is_a_zero_in_the_graph(known: int) -> None:
    features, prototype, valid = pixels_of_prototypes()
    prototype[valid] = torch.arange(int(valid.sum())) * known  # one prototype; or many of a pixel, or two
    features.requires_grad_()
    if known:
        valid.view(-1)[4:] = False
    loss = contrast(features, prototype, valid)
    loss.backward()
    assert loss == 0
    assert features.grad is not None
    assert not features.grad.any()


def test_odds_logits_are_those_of_eq_9() -> None:
    score = (2 * draw(2, 4, 50)).clamp(-12, 3)
    t = 1 / (1 + (-score).exp())  # sigmoid
    expected = (t / (1 - t)).softmax(1)  # softmax(psi(sigmoid(S)))
    torch.testing.assert_close(odds_logits(score).softmax(1), expected, rtol=1e-12, atol=1e-12)


def test_odds_logits_keep_order_gradient_and_range_where_the_odds_overflow() -> None:
    score = torch.tensor([[-200.0, 0.0, 3.0, 17.0, 90.0, 1000.0]], requires_grad=True)
    assert (score.sigmoid() / (1 - score.sigmoid())).isinf().any()  # eq. (9) as it is written
    logits = odds_logits(score)
    assert logits.isfinite().all()
    assert (logits.diff() > 0).all()
    (gradient,) = torch.autograd.grad(logits.sum(), score)
    expected = torch.tensor([[0.0, 1.0, *[math.exp(3)] * 4]])
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_exponentials_and_contrast_in_float32(dtype: torch.dtype) -> None:
    features, prototype, valid = pixels_of_prototypes()
    features = features.to(dtype)
    score = (5 * draw(2, C, 3, 4)).to(dtype)
    expected = contrast(features, prototype, valid), odds_logits(score)
    with torch.autocast("cpu", dtype=dtype):
        got = contrast(features, prototype, valid), odds_logits(score)
    assert got[0].dtype == got[1].dtype == torch.float32
    assert got[0] == expected[0]
    assert torch.equal(got[1], expected[1])


def test_one_prototype_of_each_class_is_drawn_for_all_pixels_eq_10() -> None:
    scores = [draw(2, K, 3, 4, seed=seed) for seed in range(2)]
    drawn = set()
    for step in range(40):
        first, second = one_prototype_per_class(scores, C, torch.tensor([1, step]))
        again, _ = one_prototype_per_class(scores, C, torch.tensor([1, step]))
        assert torch.equal(first, again)
        choice = [
            next(j for j in range(N) if torch.equal(first[:, c], scores[0][:, N * c + j])) for c in range(C)
        ]
        for c, j in enumerate(choice):
            assert torch.equal(second[:, c], scores[1][:, N * c + j])
        drawn.add(tuple(choice))
    assert len(drawn) == N**C  # each class for itself


def test_prototypes_are_drawn_equally_often() -> None:
    number = torch.arange(5 * 4).view(1, 20, 1, 1)
    draws = [one_prototype_per_class([number], 5, torch.tensor([1, step]))[0] for step in range(2000)]
    counts = torch.stack(draws).flatten().bincount(minlength=20)
    assert (counts - 500).abs().max() < 5 * math.sqrt(2000 * 0.25 * 0.75)
