"""Baselines of the benchmarks: they compute the package's losses, on inputs like those of training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bench.ops import baselines, eager, inputs
from bench.ops.baselines import Settings
from bench.ops.case import Options, Sizes, relative_error
from prcl_fast.losses import ProbabilisticContrast
from prcl_fast.ops import PrototypeStatistics, probabilistic_info_nce, use_backend
from prcl_fast.reference.prototype_statistics import prototype_statistics

SIZES = Sizes(2, 12, 10, 8, 5, 6, 16)
OPTIONS = Options("small", "cpu", torch.float32, "coherent")


def contrast_inputs(absent: int | None) -> tuple[Any, ...]:
    """mu, var, anchors, negatives and positive on random draws; class `absent` has no pixel."""
    generator = torch.Generator().manual_seed(0)
    batch = inputs._batch(SIZES, OPTIONS, 0)
    valid = torch.ones_like(batch.valid)
    label = batch.label.clone()
    if absent is not None:
        label[label == absent] = 255
    statistics = PrototypeStatistics(
        *prototype_statistics(batch.mu, batch.var, label, valid, SIZES.classes, False, None, None)[:3]
    )
    anchors = torch.randint(SIZES.pixels, (SIZES.classes, SIZES.anchors), generator=generator)
    shape = (SIZES.classes, SIZES.anchors, SIZES.negatives)
    negatives = torch.randint(SIZES.pixels, shape, generator=generator)
    if absent is not None:
        anchors[absent], negatives[absent] = -1, -1
    return batch.mu.requires_grad_(), batch.var.requires_grad_(), anchors, negatives, statistics


@pytest.mark.parametrize("absent", [None, 3])
@pytest.mark.parametrize("virtual", [0, 2])
@pytest.mark.parametrize(
    "settings", [Settings(0.1, "mean", True), Settings(20.0, "sum", False)], ids=["mean", "sum"]
)
def test_the_loop_and_eager_losses_are_the_op_s_on_the_same_draws(
    absent: int | None, virtual: int, settings: Settings
) -> None:
    mu, var, anchors, negatives, positive = contrast_inputs(absent)
    virtual_mu = positive.mean[:, None] + 0.1 * torch.randn(SIZES.classes, virtual, SIZES.dim)
    given = virtual_mu if virtual else None
    with use_backend("torch"):
        expected = probabilistic_info_nce(
            mu, var, anchors, negatives, positive, given,
            tau=settings.tau, reduction=settings.reduction, normalize=settings.normalize,
        )  # fmt: skip
    loop = baselines.loop_loss(mu, var, anchors, negatives, positive.mean, positive.variance, given, settings)
    plain = eager.eager_loss(mu, var, anchors, negatives, positive, given, settings)
    assert expected > 0.5
    slopes = torch.autograd.grad(expected, (mu, var))
    for loss in (loop, plain):
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
        assert relative_error(torch.autograd.grad(loss, (mu, var)), slopes) < 1e-5


def test_the_eager_loss_shares_negatives_as_the_op_does() -> None:
    mu, var, anchors, negatives, positive = contrast_inputs(None)
    shared = negatives[:, ::3]
    with use_backend("torch"):
        expected = probabilistic_info_nce(
            mu, var, anchors, shared, positive, None, tau=0.1, reduction="mean", normalize=True
        )
    torch.testing.assert_close(eager.eager_loss(mu, var, anchors, shared, positive, None), expected)


def test_the_loop_s_prototypes_are_the_reference_s() -> None:
    batch = inputs._batch(SIZES, OPTIONS, 0)
    label = torch.where(batch.label == 2, 255, batch.label)
    arguments = (batch.mu, batch.var, label, batch.valid, SIZES.classes)
    expected = PrototypeStatistics(*prototype_statistics(*arguments, False, None, None)[:3])
    mean, variance = baselines.loop_prototypes(*arguments)
    torch.testing.assert_close(mean, expected.mean)
    torch.testing.assert_close(variance, expected.variance)


def test_the_loop_draws_negatives_from_the_given_classes_and_valid_pixels() -> None:
    batch = inputs._batch(Sizes(2, 32, 32, 8, 4, 40, 50), OPTIONS, 0)
    probability = torch.tensor([[0.0, 0.7, 0.3, 0.0], [1.0, 0, 0, 0], [0, 0, 0, 1.0], [0, 0, 0, 0]])
    index = baselines.loop_negatives(probability, batch.label, batch.valid, 40, 50, np.random.default_rng(0))
    assert index.shape == (4, 40, 50)
    assert (index[3] == -1).all()
    label, valid = batch.label.flatten(), batch.valid.flatten()
    assert valid[index[:3]].all()
    assert (label[index[1]] == 0).all()
    assert (label[index[2]] == 3).all()
    share = (label[index[0]] == 1).double().mean()
    assert abs(share - 0.7) < 4 * (0.7 * 0.3 / 2000) ** 0.5
    assert len(index[1].unique()) > 100


def test_the_loop_s_anchors_are_hard_pixels_of_their_class() -> None:
    batch = inputs._batch(SIZES, OPTIONS, 0)
    hard = batch.hard & (batch.label != 1)
    index = baselines.loop_anchors(batch.label, hard, SIZES.classes, 200)
    assert (index[1] == -1).all()
    for number in (0, 2):
        assert hard.flatten()[index[number]].all()
        assert (batch.label.flatten()[index[number]] == number).all()


def test_the_whole_loop_agrees_with_the_package_up_to_its_draws() -> None:
    sizes = Sizes(2, 32, 32, 8, 4, 200, 200)
    batch = inputs._batch(sizes, OPTIONS, 0)
    module = ProbabilisticContrast(
        4, 8, tau=0.1, anchors=200, negatives=200, reduction="mean", normalize=True, prototype="local"
    )
    arguments = (batch.mu, batch.var, batch.label, batch.valid, batch.confidence)
    expected = module(*arguments, batch.seed)
    torch.manual_seed(0)
    loop = baselines.loop_contrast(*arguments, 4, 200, 200, 4)
    plain = eager.eager_contrast(*arguments, batch.seed, 4, 200, 200, 4)
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(loop, expected, rtol=0.05, atol=0.0)


def test_coherent_labels_are_two_thirds_background_and_hold_every_class() -> None:
    sizes = Sizes(4, 128, 128, 256, 21, 256, 512)
    label = inputs.labels(sizes, "coherent", torch.Generator().manual_seed(0))
    share = torch.bincount(label.flatten().long(), minlength=256) / label.numel()
    assert 0.55 < share[0] < 0.78
    assert (share[:21] > 0).all()
    assert 0 < share[255] < 0.1
    assert share[1:3].sum() > 2 * share[19:21].sum()
    right_is_equal = (label[:, :, 1:] == label[:, :, :-1]).double().mean()
    assert right_is_equal > 0.95


def test_uniform_labels_hold_every_class_alike() -> None:
    label = inputs.labels(SIZES, "uniform", torch.Generator().manual_seed(0))
    share = torch.bincount(label.flatten().long(), minlength=5) / label.numel()
    assert (abs(share - 0.2) < 0.12).all()


def test_features_are_channels_last_and_nothing_is_zero() -> None:
    batch = inputs._batch(SIZES, OPTIONS, 0)
    assert batch.mu.is_contiguous(memory_format=torch.channels_last)
    assert (batch.mu != 0).all()
    assert (batch.var > 0).all()
    assert batch.hard.any()
    assert (batch.hard <= batch.valid).all()
