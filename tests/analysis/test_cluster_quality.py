"""Separation of classes, and sigma^2 as a detector of wrong pixels, against plain transcriptions."""

from __future__ import annotations

import numpy as np
import pytest

from prcl_fast.analysis.cluster_quality import (
    cluster_quality,
    normalized,
    rank_correlation,
    ranks,
    variance_auroc,
)
from support.made_up_points import points


def test_silhouette_and_davies_bouldin_are_those_of_unit_vectors():
    x, group = points()
    unit = x / np.sqrt((x**2).sum(1, keepdims=True))
    distance = np.sqrt(((unit[:, None] - unit[None]) ** 2).sum(-1))
    scores = []
    for i, own in enumerate(group):
        a = distance[i, group == own].sum() / ((group == own).sum() - 1)
        b = min(distance[i, group == other].mean() for other in {0, 1, 3} - {own})
        scores.append((b - a) / max(a, b))
    means = {c: unit[group == c].mean(0) for c in (0, 1, 3)}
    spread = {c: np.sqrt(((unit[group == c] - means[c]) ** 2).sum(1)).mean() for c in means}
    worst = [
        max((spread[i] + spread[j]) / np.sqrt(((means[i] - means[j]) ** 2).sum()) for j in means if j != i)
        for i in means
    ]
    quality = cluster_quality(x.astype(np.float64), group, 5)
    assert quality.silhouette == pytest.approx(np.mean(scores), rel=1e-9)
    assert quality.davies_bouldin == pytest.approx(np.mean(worst), rel=1e-9)


def test_every_class_counts_alike_in_intra_and_inter_variance():
    x, group = points(1)
    unit = x / np.sqrt((x**2).sum(1, keepdims=True))
    means = np.array([unit[group == c].mean(0) for c in (0, 1, 3)])
    within = [((unit[group == c] - unit[group == c].mean(0)) ** 2).sum(1).mean() for c in (0, 1, 3)]
    quality = cluster_quality(x, group, 5)
    np.testing.assert_allclose(quality.intra_by_class, [within[0], within[1], np.nan, within[2], np.nan])
    assert quality.intra_variance == pytest.approx(np.mean(within))
    assert quality.inter_variance == pytest.approx(((means - means.mean(0)) ** 2).sum(1).mean())


def test_traces_are_those_of_the_variance_matrices_of_representations_as_they_are():
    """PCR, table 5: "intra-/inter-class variance", tr of the matrices of linear discriminant analysis."""
    x, group = points(2)
    means = np.array([x[group == c].mean(0) for c in (0, 1, 3)])
    within = np.mean([np.cov(x[group == c].T, bias=True) for c in (0, 1, 3)], axis=0)
    between = np.cov(means.T, bias=True)
    quality = cluster_quality(x.astype(np.float32), group, 5)
    assert quality.trace_intra == pytest.approx(np.trace(within), rel=1e-6)
    assert quality.trace_inter == pytest.approx(np.trace(between), rel=1e-6)
    larger = cluster_quality(10 * x, group, 5)
    assert larger.trace_intra == pytest.approx(100 * np.trace(within), rel=1e-6)
    assert larger.intra_variance == pytest.approx(quality.intra_variance, rel=1e-5)


def test_a_vector_of_zeros_stays_zero_when_lengths_become_one():
    assert normalized(np.array([[3.0, 4], [0, 0]])).tolist() == [[0.6, 0.8], [0, 0]]


def test_auroc_is_the_share_of_pairs_in_which_the_mistake_is_the_less_certain():
    variance = np.array([0.1, 0.5, 0.3, 0.3, 0.9])
    wrong = np.array([False, True, True, False, False])
    pairs = [
        (0.5 if v == w else float(v > w)) for v in variance[wrong] for w in variance[~wrong]
    ]  # mistakes against right ones
    assert variance_auroc(variance, wrong) == pytest.approx(np.mean(pairs))
    assert variance_auroc(variance, np.zeros(5, bool)) is None
    assert variance_auroc(variance, np.ones(5, bool)) is None


def test_ranks_share_ties_and_their_correlation_leaves_out_unknown_values():
    values = np.array([0.3, np.nan, 0.1, 0.3, 0.2])
    np.testing.assert_array_equal(ranks(values), [3.5, np.nan, 1, 3.5, 2])
    falling = np.array([1.0, 5, 9, 1, 4])
    assert rank_correlation(values, falling) == pytest.approx(-1)
    assert rank_correlation(values, np.ones(5)) is None
    assert rank_correlation(values[:3], falling[:3]) is None  # two pairs say nothing
