"""The authors' public code, reproduced: prototypes, contrast, unsupervised loss and schedules.

The recorded contrast was sampled at random, so it is compared within standard errors. Anchors of a class are
drawn independently of each other: one call with R times the anchors is the mean of R runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from prcl_fast.losses import ProbabilisticContrast, lambda_c, poly_lr, unsupervised_loss
from prcl_fast.ops import prototype_statistics
from support import paths

GOLDEN = np.load(paths.GOLDEN)
RECORDED_RUNS = 400
RUNS_PER_CALL = 20


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread: the operations are short, and waiting threads cost time on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recorded(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


class Sampled(NamedTuple):
    """Means over `runs` runs, in calls of RUNS_PER_CALL runs each."""

    runs: int
    loss: float
    calls: dict[str, Tensor]  # gradient of each call
    hard: int


CALLS = {0: 6, 1: 6, 2: 15}


@pytest.fixture(scope="module", params=sorted(CALLS))
def case(request: pytest.FixtureRequest) -> tuple[int, Sampled]:
    k = request.param
    num_classes, num_anchors, num_negatives, tau, delta_s = GOLDEN[f"loss{k}_params"].tolist()
    mu = recorded(f"loss{k}_mu").requires_grad_()
    var = recorded(f"loss{k}_sigma2").requires_grad_()
    contrast = ProbabilisticContrast(
        int(num_classes),
        mu.shape[1],
        tau=tau,
        anchors=int(num_anchors) * RUNS_PER_CALL,
        negatives=int(num_negatives),
        delta_s=delta_s,
        reduction="mean",
        normalize=True,
        prototype="local",
        virtual_negatives=0,
    )
    label, valid = recorded(f"loss{k}_label"), recorded(f"loss{k}_valid").bool()
    losses, grads = [], []
    for step in range(CALLS[k]):
        seed = torch.tensor([3407, step])
        loss = contrast(mu, var, label, valid, recorded(f"loss{k}_prob_of_label"), seed)
        losses.append(loss.item())
        grads.append(torch.autograd.grad(loss, (mu, var)))
    calls = {
        "mu": torch.stack([g[0] for g in grads]).double(),
        "sigma2": torch.stack([g[1] for g in grads]).double(),
    }
    hard = int(contrast.diagnostics["hard_per_class"].sum())
    return k, Sampled(CALLS[k] * RUNS_PER_CALL, float(np.mean(losses)), calls, hard)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_prototypes_are_the_recorded_ones(k: int) -> None:
    mu, var = recorded(f"loss{k}_mu"), recorded(f"loss{k}_sigma2")
    mean, variance = recorded(f"loss{k}_proto_mu"), recorded(f"loss{k}_proto_sigma2")
    label, valid = recorded(f"loss{k}_label"), recorded(f"loss{k}_valid").bool()
    got = prototype_statistics(mu, var, label, valid, len(mean))
    assert torch.equal(got.count, recorded(f"loss{k}_count"))
    torch.testing.assert_close(got.mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.variance, variance, rtol=1e-5, atol=0)


def test_mean_contrast_is_the_recorded_one(case: tuple[int, Sampled]) -> None:
    k, sampled = case
    values = GOLDEN[f"loss{k}_values"]
    error = values.std(ddof=1) * np.sqrt(1 / RECORDED_RUNS + 1 / sampled.runs)
    assert abs(sampled.loss - values.mean()) < 4 * error


@pytest.mark.parametrize("name", ["mu", "sigma2"])
def test_mean_gradients_are_the_recorded_ones(case: tuple[int, Sampled], name: str) -> None:
    k, sampled = case
    mean = recorded(f"loss{k}_grad_{name}_mean").double()
    sem = recorded(f"loss{k}_grad_{name}_sem").double()
    got = sampled.calls[name].mean(0)
    drawn = sem > 0
    assert torch.equal(mean != 0, drawn)
    assert (got[~drawn] == 0).all()

    # Both sides have the same variance per run, which the next test checks.
    z = ((got - mean) / (sem * (1 + RECORDED_RUNS / sampled.runs) ** 0.5))[drawn]
    # The D elements of a pixel share its draws; counting each hard pixel as one degree of freedom gives an
    # upper bound on the spread of the mean of z^2. Four of them.
    assert abs(z.square().mean() - 1) < 4 * (2 / sampled.hard) ** 0.5
    assert z.abs().max() < 6
    # The size of the gradient as a whole; the recorded noise adds to the recorded norm.
    slope = (got * mean).sum() / (mean.square().sum() - sem.square().sum())
    assert abs(slope - 1) < 0.05


@pytest.mark.parametrize("name", ["mu", "sigma2"])
def test_gradients_vary_from_run_to_run_as_the_recorded_ones(case: tuple[int, Sampled], name: str) -> None:
    k, sampled = case
    sem = recorded(f"loss{k}_grad_{name}_sem").double()
    drawn = sem > 0
    per_run = sampled.calls[name].var(0) * RUNS_PER_CALL
    ratio = (per_run[drawn] / (sem[drawn].square() * RECORDED_RUNS)).mean()
    # A variance from n calls is off by sqrt(2 / (n - 1)), less the averaging over hundreds of hard pixels:
    # 0.03.
    assert abs(ratio - 1) < 0.12


def test_unsupervised_loss_is_the_recorded_one() -> None:
    logits, label, confidence = (recorded(f"unsup_{name}") for name in ("pred", "label", "conf"))
    label = label.masked_fill(label < 0, 255).long()  # recorded with -1 for ignored pixels
    loss = unsupervised_loss(logits, label, confidence, 0.97, omega="image")
    assert abs(loss.item() - GOLDEN["unsup_loss"].item()) < 1e-6


def test_schedules_are_the_recorded_ones() -> None:
    rates = [poly_lr(6.4e-3, torch.tensor(step), 50) for step in range(50)]
    np.testing.assert_allclose(rates, GOLDEN["poly_lr_50"], rtol=1e-6)
    weights = [lambda_c(1.0, torch.tensor(step), 50) for step in range(50)]
    np.testing.assert_allclose(weights, GOLDEN["lambda_c_50"], rtol=1e-6)
