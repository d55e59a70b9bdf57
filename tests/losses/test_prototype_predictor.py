"""The prototype predictor of PCR and its K-means against a plain transcription."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from prcl_fast.methods.pcr import cluster_centers
from support.plain_pcr import C, D, K, T, draw, plain_scores, plain_update, predictor
from support.stub_networks import IGNORE

# Eq. (2).


def test_scores_are_of_the_nearest_prototype_and_their_gradient_is_the_features() -> None:
    made, features = predictor(), draw(2, D, 3, 4).double().requires_grad_()
    scores, expected = made.double()(features), plain_scores(features, made.prototypes)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
    weight = draw(*scores.shape, seed=1).double()
    (expected.softmax(1) * weight).sum().backward()
    wanted, features.grad = features.grad, None
    (scores.double().softmax(1) * weight).sum().backward()
    torch.testing.assert_close(features.grad, wanted, rtol=1e-4, atol=1e-6)
    assert not made.prototypes.requires_grad
    assert not list(made.parameters())


def test_a_class_without_prototypes_has_the_lowest_score() -> None:
    scores = predictor((True, False, True))(draw(2, D, 3, 4))
    assert (scores[:, 1] == -1 / T).all()
    assert (scores[:, [0, 2]] > -1 / T).all()


def test_scores_under_autocast_are_float32() -> None:
    made, features = predictor(), draw(2, D, 3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = made(features.bfloat16())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, made(features), rtol=0, atol=0.03 / T)


# Eq. (11).


def labels(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.tensor([0, 1, 2, IGNORE, C])[torch.randint(0, 5, (2, 3, 4), generator=generator)]
    return label, torch.rand(2, 3, 4, generator=generator) < 0.7


def test_prototypes_move_to_the_mean_of_the_nearest_features_of_their_class() -> None:
    made, features, (label, valid) = predictor(), 5 * draw(2, D, 3, 4), labels()
    label[label == 0] = 1  # class 0 has no pixels
    features[:, :, 0] = torch.nan  # nor does it matter what those hold that do not count
    valid[:, 0] = False
    before = made.prototypes.clone()
    expected, moved = plain_update(before, features, label, valid, (True,) * C)
    made.update(features, label.to(torch.uint8), valid)
    torch.testing.assert_close(made.prototypes.double(), expected, rtol=1e-6, atol=1e-6)
    assert {
        key for key in product(range(C), range(K)) if not torch.equal(made.prototypes[key], before[key])
    } == moved
    assert 2 <= len(moved) <= 2 * K


def test_a_class_without_prototypes_at_the_start_stays_without() -> None:
    made, (label, valid) = predictor((True, False, True)), labels()
    made.update(draw(2, D, 3, 4), label, valid)
    assert not made.prototypes[1].any()
    assert made.prototypes[0].any()
    assert made.known.tolist() == [True, False, True]


# Algorithm 2.


def test_k_means_finds_clusters_that_are_apart() -> None:
    centers = 10 * draw(4, D)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    features = (centers.repeat(20, 1) + 0.1 * draw(80, D, seed=2))[order]
    found = cluster_centers(features, 4, seed=0)
    distance = torch.cdist(centers, found)
    assert (distance.min(1).values < 0.15).all()
    assert sorted(distance.argmin(1).tolist()) == [0, 1, 2, 3]
    assert found.dtype == torch.float32
    assert torch.equal(found, cluster_centers(features, 4, seed=0))


@pytest.mark.parametrize("distinct", [1, 3])
def test_k_means_of_fewer_features_than_prototypes_repeats_them(distinct: int) -> None:
    features = draw(distinct, D)
    for rows in (features, features.repeat(4, 1)):
        found = cluster_centers(rows, 8, seed=2**40)
        assert found.shape == (8, D)
        distance = torch.cdist(found, features)
        assert distance.min(1).values.max() < 1e-5
        assert distance.argmin(1).unique().tolist() == list(range(distinct))


def test_a_class_without_features_has_no_centers() -> None:
    assert not cluster_centers(torch.empty(0, D), K, seed=0).any()
