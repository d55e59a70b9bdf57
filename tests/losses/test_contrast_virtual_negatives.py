"""The contrast of eq. (15): virtual negatives of all classes with a global prototype, and its terms."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from test_contrast import C, D, local, make, scene
from torch import Tensor

from prcl_fast.config.contrast import ContrastConfig
from prcl_fast.losses import ProbabilisticContrast, explain_inert
from prcl_fast.losses import contrast as contrast_module
from prcl_fast.losses.virtual_negatives import moments_of_means, variance_of_means
from prcl_fast.ops import (
    PrototypeStatistics,
    Purpose,
    class_lists,
    philox_normal,
    probabilistic_info_nce,
)
from support.backends import everywhere, on_backend

PAPER = {"tau": 100.0, "reduction": "sum", "normalize": False}


def spy(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    drawn = []

    def spied(*args: Any, **options: Any) -> Tensor:
        drawn.append((*args, options))
        return probabilistic_info_nce(*args, **options)

    monkeypatch.setattr(contrast_module, "probabilistic_info_nce", spied)
    return drawn


def placed(batch: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {
        name: value.detach().to(device).requires_grad_(value.requires_grad) for name, value in batch.items()
    }


def mls(mu_i: Tensor, s_i: Tensor, mu_j: Tensor, s_j: Tensor) -> Tensor:
    """IJCV eq. (3)."""
    return -0.5 * ((mu_i - mu_j) ** 2 / (s_i + s_j) + torch.log(s_i + s_j)).sum(-1)


@pytest.mark.parametrize("prototype", ["global", "ema", "local"])
def test_the_loss_is_eq_15_with_the_virtual_negatives_of_eq_10(
    monkeypatch: pytest.MonkeyPatch, prototype: str
) -> None:
    """IJCV eq. (15) in float64: C~_l are the other classes of the batch, C~_g those of all batches so far."""
    drawn = spy(monkeypatch)
    settings = {**PAPER, "tau": 20.0, "beta": 3.0, "virtual_negatives": 2, "prototype": prototype}
    contrast = make(**settings)
    batches = [scene(0, (1, 3, 255)), scene(1)]  # class 3 is in the first batch only
    for batch in batches:
        loss = contrast(**batch)
    mu, var, anchors, negatives, *_ = drawn[-1]
    rows, variances = (x.detach().double().movedim(1, -1).reshape(-1, D) for x in (mu, var))

    steps = [local({**b, "mu": b["mu"].detach(), "var": b["var"].detach()}) for b in batches]
    precision = sum(step.precision.double() for step in steps)  # eq. (9)
    weighted_mean = sum(step.weighted_mean.double() for step in steps)
    variance_g = 1 / precision
    mean_g = weighted_mean / precision
    noise = philox_normal(batches[-1]["seed"], (C, 2, D), Purpose.VIRTUAL_NEGATIVES)
    virtual = mean_g[:, None] + 3.0 * noise.double() * variance_g[:, None]  # eq. (10)

    if prototype == "global":
        rho = mean_g, variance_g
    elif prototype == "local":  # eq. (4)
        rho = steps[-1].mean.double(), steps[-1].variance.double()
    else:  # eq. (16), from the first value on
        moved = []
        for name in ("mean", "variance"):
            old, new = (getattr(step, name).double() for step in steps)
            seen = (steps[0].count > 0)[:, None]
            moved.append(torch.where(seen, 0.99 * old + 0.01 * new, new))
        rho = moved[0], moved[1]

    total = 0.0
    classes = (0, 1, 2)
    for c in classes:
        for a, i in enumerate(anchors[c].tolist()):
            anchor = rows[i], variances[i]
            scores = [mls(*anchor, rho[0][c], rho[1][c])]
            scores += [mls(*anchor, rows[j], variances[j]) for j in negatives[c, a].tolist()]
            others = [k for k in (0, 1, 2, 3) if k != c]  # class 3 too, which is absent
            scores += [mls(*anchor, virtual[k, v], torch.zeros(D)) for k in others for v in range(2)]
            scaled = torch.stack(scores) / 20.0
            total += float(torch.logsumexp(scaled, 0) - scaled[0]) / len(anchors[c]) / len(classes)
    assert math.isclose(float(loss.detach()), total, rel_tol=2e-5)
    chance = math.log(1 + 32 + 2 * 3)
    assert math.isclose(float(contrast.diagnostics["chance_level"]), chance, rel_tol=1e-6)
    assert contrast.diagnostics["virtual_classes"] == 4


@everywhere("probabilistic_info_nce")
@pytest.mark.parametrize("prototype", ["global", "ema", "local"])
def test_moving_the_prototype_of_an_absent_class_changes_the_loss(
    device: str, backend: str, prototype: str
) -> None:
    losses = []
    for moved in (0.0, 1.5):
        contrast = make(**PAPER, prototype=prototype).to(device)
        with on_backend(backend):
            contrast(**placed(scene(0, (0, 1, 2, 3, 255)), device))
            contrast.weighted_mean[3] += moved * contrast.precision[3]
            losses.append(float(contrast(**placed(scene(1), device)).detach()))
    assert abs(losses[0] - losses[1]) > 1e-3 * losses[0]


@everywhere("probabilistic_info_nce")
def test_with_one_class_present_and_others_known_the_loss_is_not_0(device: str, backend: str) -> None:
    contrast = make(**PAPER, virtual_negatives=2).to(device)
    with on_backend(backend):
        contrast(**placed(scene(0), device))
        batch = placed(scene(1, (1, 255)), device)
        loss = contrast(**batch)
        loss.backward()
    assert loss > 0.1
    assert batch["mu"].grad.abs().sum() > 0
    assert math.isclose(float(contrast.diagnostics["chance_level"]), math.log(1 + 2 * 2), rel_tol=1e-6)
    assert contrast.diagnostics["negatives"] == 0
    assert explain_inert(contrast.diagnostics) is None


def test_masses_are_the_softmax_of_eq_15(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = spy(monkeypatch)
    contrast = make(**{**PAPER, "tau": 5.0}, virtual_negatives=3, anchors_per_set=2)
    contrast(**scene(0))
    contrast(**scene(1))
    mu, var, anchors, negatives, positive, virtual, _ = drawn[-1]
    rows, variances = (x.detach().double().movedim(1, -1).reshape(-1, D) for x in (mu, var))
    masses = []
    for c in (0, 1, 2):
        for a in range(4):
            i = anchors[c, a]
            anchor = rows[i], variances[i]
            others = [k for k in (0, 1, 2) if k != c]
            scores = torch.cat(
                [
                    mls(*anchor, positive.mean[c].double(), positive.variance[c].double())[None],
                    mls(*anchor, rows[negatives[c, a // 2]], variances[negatives[c, a // 2]]),
                    mls(*anchor, virtual[others].double().flatten(0, 1), torch.zeros(D)),
                ]
            )
            softmax = (scores / 5.0).softmax(0)
            masses.append(torch.stack([softmax[0], softmax[1:33].sum(), softmax[33:].sum()]))
    assert contrast.terms is not None
    got = contrast.terms.masses()
    expected = torch.stack(masses).mean(0).tolist()
    assert list(got) == ["positive", "real", "virtual"]
    assert list(got.values()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["prototype", "local", "uniform"])
def test_classes_of_real_negatives_come_from_the_scores_that_were_asked_for(kind: str) -> None:
    contrast = make(**{**PAPER, "tau": 4.0}, negative_classes=kind)
    for step in range(3):
        contrast(**scene(step))
    assert contrast.terms is not None
    got = contrast.terms.class_probability
    batch = scene(2)
    if kind == "uniform":
        expected = torch.tensor([[0, 0.5, 0.5, 0], [0.5, 0, 0.5, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 0]])
    else:
        chosen = local(batch)
        if kind == "prototype":
            chosen = PrototypeStatistics(
                contrast.precision.float(), contrast.weighted_mean.float(), chosen.count
            )
        mean, variance = chosen.mean.detach(), chosen.variance.detach()
        expected = torch.zeros(C, C)
        for c in range(3):
            others = [k for k in range(3) if k != c]
            scores = mls(mean[c], variance[c], mean[others], variance[others])
            expected[c, others] = (scores / 4.0).softmax(0)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)
    entropy = [-(row[row > 0] * row[row > 0].log()).sum() for row in expected[:3]]
    assert contrast.terms.negative_classes() == pytest.approx(
        float(torch.stack(entropy).exp().mean()), rel=1e-3
    )


def test_the_spread_of_eq_10_dies_out_and_that_of_the_class_does_not() -> None:
    ratios: dict[str, list[float]] = {}
    for kind in ("prototype", "class"):
        contrast = make(**PAPER, virtual_spread=kind)
        ratios[kind] = []
        for step in range(30):
            contrast(**scene(step))
            assert contrast.terms is not None
            ratios[kind].append(contrast.terms.virtual_spread())
    assert ratios["prototype"][29] < 0.05 * ratios["prototype"][0]
    assert ratios["class"][29] > 0.8 * ratios["class"][0]
    # The last state again, by hand.
    mean = (contrast.weighted_mean / contrast.precision)[:3]
    expected = (contrast.spread[:3].double().sum(1).sqrt() / mean.norm(dim=1)).mean()
    assert ratios["class"][29] == pytest.approx(float(expected), rel=1e-5)


def test_the_spread_of_a_class_is_the_variance_of_its_means() -> None:
    """At a batch whose means have a spread of 0.5 around the class's centre."""
    batch = scene()
    wide = {name: batch[name].detach().repeat(40, *[1] * (batch[name].dim() - 1)) for name in ("mu", "label")}
    wide["mu"] = wide["mu"] + 0.1 * torch.randn(wide["mu"].shape, generator=torch.Generator().manual_seed(0))
    valid = torch.ones_like(wide["label"], dtype=torch.bool)
    lists = class_lists(wide["label"], valid, valid, C)
    found = torch.stack(
        [
            variance_of_means(
                moments_of_means(wide["mu"], wide["label"], valid, C, torch.tensor([1, step]), lists)
            )
            for step in range(50)
        ]
    ).mean(0)
    rows = wide["mu"].movedim(1, -1)
    for c in range(3):
        expected = rows[wide["label"] == c].var(0, unbiased=False)
        # 50 times 64 draws: a standard error of 2.5 %, and a bias of 1/64.
        torch.testing.assert_close(found[c], expected, rtol=0.12, atol=0)
    assert (found[3] == 0).all()


def test_op_module_and_yaml_have_the_same_defaults() -> None:
    parameters = inspect.signature(probabilistic_info_nce).parameters
    defaults = ContrastConfig()
    for name in ("reduction", "normalize"):
        assert parameters[name].default == getattr(defaults, name)
    assert ProbabilisticContrast(C, D).settings == defaults
    given = ContrastConfig(tau=3.0)
    assert ProbabilisticContrast(C, D, given).settings is given
    changed = ProbabilisticContrast(C, D, given, anchors=8).settings
    assert changed == ContrastConfig(tau=3.0, anchors=8)
