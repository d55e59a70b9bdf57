"""ProbabilisticContrast: prototypes over steps, participating classes, diagnostics."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from prcl_fast.losses import ProbabilisticContrast, explain_inert
from prcl_fast.losses import contrast as contrast_module
from prcl_fast.losses.negative_classes import negative_class_probability
from prcl_fast.losses.virtual_negatives import draw_virtual_negatives
from prcl_fast.ops import PrototypeStatistics, probabilistic_info_nce, prototype_statistics

C, D = 4, 8


def scene(seed: int = 0, labels: tuple[int, ...] = (0, 1, 2, 255)) -> dict[str, Tensor]:
    """A batch without class 3; the pixels of a class lie around one direction."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.tensor(labels)[torch.randint(0, len(labels), (2, 8, 9), generator=generator)]
    centre = torch.randn(256, D, generator=torch.Generator().manual_seed(99))
    mu = centre[label].movedim(-1, 1) + 0.5 * torch.randn(2, D, 8, 9, generator=generator)
    return {
        "mu": mu.contiguous().requires_grad_(),
        "var": (0.05 + 0.9 * torch.rand(2, D, 8, 9, generator=generator)).requires_grad_(),
        "label": label,
        "valid": torch.rand(2, 8, 9, generator=generator) < 0.9,
        "confidence": torch.rand(2, 8, 9, generator=generator),
        "seed": torch.tensor([5, seed]),
    }


def make(**options: Any) -> ProbabilisticContrast:
    return ProbabilisticContrast(
        C,
        D,
        **{"tau": 0.1, "reduction": "mean", "normalize": True, "anchors": 16, "negatives": 32, **options},
    )


def local(batch: dict[str, Tensor]) -> PrototypeStatistics:
    return prototype_statistics(batch["mu"], batch["var"], batch["label"], batch["valid"], C)


def spy_on_positive(monkeypatch: pytest.MonkeyPatch) -> list[PrototypeStatistics]:
    seen = []

    def spy(*args: Any, **options: Any) -> Tensor:
        seen.append(args[4])
        return probabilistic_info_nce(*args, **options)

    monkeypatch.setattr(contrast_module, "probabilistic_info_nce", spy)
    return seen


def test_global_prototypes_are_the_merge_of_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy_on_positive(monkeypatch)
    contrast = make(prototype="global")
    batches = [scene(0), scene(1, (0, 2, 255)), scene(2)]
    for batch in batches:
        contrast(**batch)
    parts = [local(batch) for batch in batches]
    merged = PrototypeStatistics(
        sum(part.precision for part in parts),
        sum(part.weighted_mean for part in parts),
        sum(part.count for part in parts),
    )
    torch.testing.assert_close(seen[-1].mean, merged.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen[-1].variance, merged.variance, rtol=1e-5, atol=0)
    # The batch, not the stored prototypes, decides which classes take part.
    assert torch.equal(seen[1].count, local(batches[1]).count)
    assert seen[1].count[1] == 0


def test_global_state_keeps_growing_where_float32_would_stop() -> None:
    contrast = make(prototype="global")
    contrast.precision.fill_(2.0**40)
    before = contrast.precision.clone()
    batch = scene()
    contrast(**batch)
    torch.testing.assert_close(
        (contrast.precision - before).float(), local(batch).precision, rtol=1e-3, atol=0
    )


def test_ema_prototypes_start_at_first_sight_and_rest_while_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy_on_positive(monkeypatch)
    contrast = make(prototype="ema", prototype_ema=0.9)
    first, second, third = scene(0, (0, 2, 255)), scene(1, (1, 2, 255)), scene(2)
    for batch in (first, second, third):
        contrast(**batch)
    a, b, c = local(first), local(second), local(third)
    torch.testing.assert_close(seen[0].mean[[0, 2]], a.mean[[0, 2]])
    torch.testing.assert_close(seen[1].mean[1], b.mean[1])
    for name in ("mean", "variance"):
        x, y, z = (getattr(statistics, name) for statistics in (a, b, c))
        torch.testing.assert_close(getattr(seen[1], name)[2], 0.9 * x[2] + 0.1 * y[2])
        torch.testing.assert_close(getattr(seen[2], name)[0], 0.9 * x[0] + 0.1 * z[0])


def test_local_prototypes_are_this_batchs_and_leave_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy_on_positive(monkeypatch)
    contrast = make(prototype="local", virtual_negatives=0)
    contrast(**scene(0))
    batch = scene(1)
    contrast(**batch)
    torch.testing.assert_close(seen[-1].mean, local(batch).mean)
    assert not contrast.state_dict()


def test_shared_negatives_leave_the_expectation_of_loss_and_gradient() -> None:
    direction = torch.randn(scene()["mu"].shape, generator=torch.Generator().manual_seed(3))
    results: dict[int, list[Tensor]] = {1: [], 8: []}
    for anchors_per_set, values in results.items():
        contrast = make(prototype="local", anchors_per_set=anchors_per_set, virtual_negatives=0, tau=0.5)
        for step in range(200):
            batch = scene() | {"seed": torch.tensor([11, step])}
            loss = contrast(**batch)
            loss.backward()
            slope = (batch["mu"].grad * direction).sum()  # one number that has a mean and a spread
            values.append(torch.stack([loss.detach(), slope]))
    mean, error = zip(
        *((torch.stack(v).mean(0), torch.stack(v).std(0) / 200**0.5) for v in results.values()), strict=True
    )
    assert ((mean[0] - mean[1]).abs() < 4 * (error[0].square() + error[1].square()).sqrt()).all()
    assert (mean[0].abs() > 4 * error[0]).all()  # else the comparison would say nothing
    with pytest.raises(ValueError, match=r"anchors_per_set: must divide anchors \(16\)"):
        make(anchors_per_set=5)


@pytest.mark.parametrize("prototype", ["global", "ema"])
def test_state_survives_a_checkpoint_bit_for_bit(prototype: str) -> None:
    contrast = make(prototype=prototype)
    contrast(**scene(0))
    restored = make(prototype=prototype)
    restored.load_state_dict(contrast.state_dict())
    assert torch.equal(contrast(**scene(1)), restored(**scene(1)))


@pytest.mark.parametrize("prototype", ["global", "ema"])
def test_a_step_that_is_not_finite_does_not_spoil_the_state(prototype: str) -> None:
    contrast = make(prototype=prototype)
    contrast(**scene(0))
    before = {name: value.clone() for name, value in contrast.state_dict().items()}
    batch = scene(1, (0, 1, 255))
    with torch.no_grad():
        batch["mu"].movedim(1, -1)[batch["label"] == 1] = torch.nan
    assert torch.isnan(contrast(**batch))
    for name, value in contrast.state_dict().items():
        assert torch.equal(value[1], before[name][1])
        assert torch.isfinite(value).all()


def test_loss_depends_on_seed_and_step_alone() -> None:
    batch = scene()
    first = make()(**batch)
    torch.manual_seed(123)
    assert torch.equal(first, make()(**batch))
    assert not torch.equal(first, make()(**{**batch, "seed": torch.tensor([5, 1])}))


def test_anchors_are_valid_and_below_delta_s() -> None:
    batch = scene()
    make()(**batch).backward()
    hard = batch["valid"] & (batch["confidence"] < 0.8) & (batch["label"] < C)
    moved = batch["mu"].grad.abs().sum(1) > 0
    assert not (moved & ~hard).any()
    assert moved.any()
    assert torch.equal(moved, batch["var"].grad.abs().sum(1) > 0)


def test_negative_classes_follow_the_scores_of_the_prototypes() -> None:
    positive = local(scene())
    got = negative_class_probability(positive, 0.5, reduction="sum", normalize=False, uniform=False)
    present = positive.count > 0
    for c in range(C):
        for k in range(C):
            if c == k or not present[c] or not present[k]:
                assert got[c, k] == 0
    s = positive.variance[0] + positive.variance[[1, 2]]
    d = positive.mean[0] - positive.mean[[1, 2]]
    score = -0.5 * (d**2 / s + s.log()).sum(1)
    torch.testing.assert_close(got[0, [1, 2]], (score / 0.5).softmax(0), rtol=1e-4, atol=1e-7)


def test_virtual_negatives_spread_by_the_variance_around_the_mean() -> None:
    positive = local(scene())
    virtual = draw_virtual_negatives(positive, 2000, 2.0, torch.tensor([1, 1]), positive.variance)
    assert virtual.shape == (C, 2000, D)
    present = positive.count > 0
    # 2000 draws: the standard error of the mean is 2.2 % of the spread, of the spread 1.6 %.
    spread = 2.0 * positive.variance[present]
    error = (virtual[present].mean(1) - positive.mean[present]) / spread
    assert error.abs().max() < 0.1
    assert (virtual[present].std(1) / spread - 1).abs().max() < 0.08
    assert torch.isfinite(virtual).all()


def test_virtual_negatives_raise_the_loss() -> None:
    batch = scene()
    assert make(virtual_negatives=4)(**batch) > make(virtual_negatives=0)(**batch)


def test_deterministic_contrast_is_info_nce_of_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is rebuilt from the drawn indices with cosine similarities alone."""
    drawn = []

    def spy(*args: Any, **options: Any) -> Tensor:
        drawn.append(args)
        return probabilistic_info_nce(*args, **options)

    monkeypatch.setattr(contrast_module, "probabilistic_info_nce", spy)
    batch = scene()
    contrast = make(representation="deterministic", virtual_negatives=0, prototype="local", tau=0.3)
    loss = contrast(**{**batch, "var": None})
    mu, _, anchors, negatives, _, _ = drawn[0]
    rows = F.normalize(mu.movedim(1, -1).reshape(-1, D), dim=1)
    total = 0.0
    for c in (0, 1, 2):
        member = ((batch["label"] == c) & batch["valid"]).flatten()
        prototype = F.normalize(mu.movedim(1, -1).reshape(-1, D)[member].mean(0), dim=0)
        anchor = rows[anchors[c]]
        cosines = torch.cat(
            [(anchor @ prototype)[:, None], torch.einsum("ad,and->an", anchor, rows[negatives[c]])], 1
        )
        total += F.cross_entropy(cosines / 0.3, torch.zeros(len(cosines), dtype=torch.int64)) / 3
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert batch["mu"].grad.abs().sum() > 0


@pytest.mark.parametrize("prototype", ["global", "ema", "local"])
def test_no_negative_at_all_gives_a_zero_that_stays_in_the_graph(prototype: str) -> None:
    for labels in ((255,), (1, 255)):
        batch = scene(0, labels)
        contrast = make(prototype=prototype)
        loss = contrast(**batch)
        loss.backward()
        assert loss == contrast.diagnostics["chance_level"] == 0
        assert (batch["mu"].grad == 0).all()
        assert torch.isfinite(batch["var"].grad).all()


def test_autocast_and_bfloat16_features_keep_float32_inside() -> None:
    batch = scene()
    expected = make()(**batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(make()(**batch), expected)
    low = {**batch, "mu": batch["mu"].detach().bfloat16(), "var": batch["var"].detach().bfloat16()}
    rounded = {**low, "mu": low["mu"].float(), "var": low["var"].float()}
    assert make()(**low).dtype == torch.float32
    torch.testing.assert_close(make()(**low), make()(**rounded), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"representation": "deterministic", "virtual_negatives": 0},
        {"memory_bank": 40, "virtual_negatives": 0},
    ],
)
def test_means_may_be_narrower_than_variances(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Both as under autocast: the loss is that of the same values in float32, gradients have the dtypes."""
    batch = scene()
    losses, gradients = [], []
    for mu in (batch["mu"].detach().to(dtype), batch["mu"].detach().to(dtype).float()):
        leaves = {"mu": mu.requires_grad_(), "var": batch["var"].detach().requires_grad_()}
        losses.append(make(**options)(**{**batch, **leaves}))
        losses[-1].backward()
        gradients.append([leaf.grad for leaf in leaves.values() if leaf.grad is not None])
        assert all(leaf.grad is None or leaf.grad.dtype == leaf.dtype for leaf in leaves.values())
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for got, expected in zip(*gradients, strict=True):
        tolerance = 1e-5 + (torch.finfo(dtype).eps if got.dtype == dtype else 0.0)
        assert (got.float() - expected).norm() < tolerance * expected.norm()


def test_compiles_whole_and_updates_the_state() -> None:
    batch = scene()
    eager, traced = make(), make()
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch), eager(**batch))
    torch.testing.assert_close(traced.precision, eager.precision)


class CountedCalls(TorchDispatchMode):
    """Number of calls of each op of the package."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prcl_fast":
            self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"memory_bank": 40, "virtual_negatives": 0}, {"normalize": False}])
def test_class_lists_are_made_once_a_step(options: dict[str, Any]) -> None:
    contrast, batch = make(**options), scene()
    with CountedCalls() as counted:
        contrast(**batch)
    assert counted.calls["class_lists"] == 1
    assert counted.calls["prototype_statistics"] == counted.calls["sample_negatives"] == 1
    assert counted.calls["sample_anchors"] == (2 if "memory_bank" in options else 1)


@pytest.mark.parametrize("normalize", [True, False])
def test_norms_of_the_prototype_pass_reach_the_loss(monkeypatch: pytest.MonkeyPatch, normalize: bool) -> None:
    seen = []

    def spy(*args: Any, **options: Any) -> Tensor:
        seen.append(options["inverse_norm"])
        return probabilistic_info_nce(*args, **options)

    monkeypatch.setattr(contrast_module, "probabilistic_info_nce", spy)
    batch = scene()
    make(normalize=normalize)(**batch)
    if not normalize:
        assert seen == [None]
        return
    counts = batch["valid"] & (batch["label"] < C)
    torch.testing.assert_close(seen[0], torch.where(counts, 1 / batch["mu"].detach().norm(dim=1), 0.0))


def test_wrong_arguments_are_named() -> None:
    for options, match in (
        ({"tau": 0.0}, "tau: input should be greater than 0, got 0.0"),
        ({"reduction": "none"}, "reduction: input should be 'sum' or 'mean', got 'none'"),
        ({"prototype": "best"}, "prototype: input should be 'local', 'ema' or 'global', got 'best'"),
        ({"prototype_ema": 1.5}, "prototype_ema: input should be less than or equal to 1"),
        ({"virtual_negatives": -1}, "virtual_negatives: input should be greater than or equal to 0"),
        ({"anchors": 0}, "anchors: input should be greater than or equal to 1, got 0"),
        ({"delta_s": 2.0}, "delta_s: input should be less than or equal to 1"),
        (
            {"representation": "deterministic"},
            "virtual_negatives: must be 0 with representation deterministic",
        ),
        ({"memory_bank": 8}, "memory_bank: takes the place of virtual_negatives"),
        ({"num_anchors": 8}, "unknown key num_anchors; did you mean anchors"),
    ):
        with pytest.raises(ValueError, match=match):
            make(**options)


def test_diagnostics_count_pixels_draws_and_the_chance_level() -> None:
    batch = scene()
    contrast = make(virtual_negatives=3)
    loss = contrast(**batch)
    got = contrast.diagnostics
    hard = batch["valid"] & (batch["confidence"] < 0.8)
    expected_hard = [int(((batch["label"] == c) & hard).sum()) for c in range(C)]
    assert got["hard_per_class"].tolist() == expected_hard
    assert got["anchors_per_class"].tolist() == [min(n, 16) for n in expected_hard]
    assert got["valid_per_class"].tolist() == local(batch).count.tolist()
    assert got["present_classes"] == 3
    assert got["negatives"] == 3 * 16 * 32
    assert got["loss"] == loss
    assert not got["loss"].requires_grad
    assert math.isclose(float(got["chance_level"]), math.log(1 + 32 + 2 * 3), rel_tol=1e-6)
    assert explain_inert(got) is None


@pytest.mark.parametrize(
    ("options", "change", "sentence"),
    [
        ({}, {"valid": False}, "no valid pixel"),
        ({}, {"labels": (1, 255)}, "only class 1 has valid pixels or a prototype"),
        ({}, {"confidence": 0.9}, "no hard pixel"),
        ({"tau": 1000.0}, {}, "at the chance level"),
        ({"tau": 1e-4, "virtual_negatives": 0}, {"spread": 0.01}, "tau is too small"),
        ({}, {"nan": True}, "no longer finite"),
    ],
)
def test_explain_inert_says_why(options: dict[str, Any], change: dict[str, Any], sentence: str) -> None:
    batch = scene(0, change.get("labels", (0, 1, 2, 255)))
    if "valid" in change:
        batch["valid"] = torch.zeros_like(batch["valid"])
    if "confidence" in change:
        batch["confidence"] = torch.full_like(batch["confidence"], change["confidence"])
    if "spread" in change:
        batch["mu"] = (
            F.one_hot(batch["label"] % D, D).movedim(-1, 1).float() + change["spread"] * batch["mu"].detach()
        )
    if "nan" in change:
        batch["mu"] = torch.full_like(batch["mu"], torch.nan)
    contrast = make(**options)
    contrast(**batch)
    assert sentence in (explain_inert(contrast.diagnostics) or "")
