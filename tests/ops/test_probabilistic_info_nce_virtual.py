"""Virtual negatives of the InfoNCE: those of all known classes, in the batch or not, eq. (15) of [IJCV]."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prcl_fast.ops import PrototypeStatistics, probabilistic_info_nce
from support.backends import run_everywhere
from support.info_nce_scene import C, D, V, by_hand, by_reference, in_float64, scene

place = run_everywhere("probabilistic_info_nce")

# Class 4 is absent from the scene's batch and has a prototype, class 1 is present without one that is kept.
KNOWN = torch.tensor([True, False, True, True, True])


def variances(seed: int = 0) -> Tensor:
    return 0.03 + torch.rand(C, V, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def present_alone(case: dict[str, Any], c: int) -> dict[str, Any]:
    """The scene with one class in the batch: no anchor has a real negative."""
    positive = case["positive"]
    count = torch.where(torch.arange(C) == c, positive.count, 0)
    negatives = torch.full_like(case["negative_index"], -1)
    one = PrototypeStatistics(positive.precision, positive.weighted_mean, count)
    return case | {"positive": one, "negative_index": negatives}


def of_both(loss: Tensor, case: dict[str, Any]) -> tuple[Tensor, ...]:
    """The loss and its gradients to mu and var."""
    return loss.detach(), *torch.autograd.grad(loss, (case["mu"], case["var"]))


@pytest.mark.parametrize("points", [True, False], ids=["points", "distributions"])
@pytest.mark.parametrize(
    ("reduction", "normalize", "tau"),
    [("sum", False, 2.0), ("mean", True, 0.1), ("sum", True, 0.5), ("mean", False, 1.0)],
)
def test_loss_and_gradients_equal_the_equation(
    reduction: str, normalize: bool, tau: float, points: bool
) -> None:
    case = scene()
    options: dict[str, Any] = {
        "tau": tau,
        "reduction": reduction,
        "normalize": normalize,
        "virtual_known": KNOWN,
        "virtual_var": None if points else variances(),
    }
    expected = of_both(by_hand(case, **options), case)
    for loss in (probabilistic_info_nce(**case, **options), by_reference(**case, **options)):
        got = of_both(loss, case)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-12, atol=0)
        for grad, want in zip(got[1:], expected[1:], strict=True):
            torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("classes", "anchors", "groups", "virtual", "dim"),
    [
        (2, 1, 1, 1, 1),
        (3, 2, 1, 7, 3),
        (5, 4, 2, 5, 33),
        (23, 1, 1, 3, 8),
        (3, 3, 3, 2, 300),
        (4, 2, 2, 9, 64),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("points", [True, False], ids=["points", "distributions"])
def test_odd_sizes_agree_with_float64(
    classes: int, anchors: int, groups: int, virtual: int, dim: int, dtype: torch.dtype, points: bool
) -> None:
    generator = torch.Generator().manual_seed(dim)
    shape = (2, dim, 7, 5)
    precision = torch.rand(classes, dim, generator=generator) + 0.5
    count = torch.arange(classes) % 3  # every third class is absent, the first among them
    case: dict[str, Any] = {
        "mu": torch.randn(shape, generator=generator).to(dtype).requires_grad_(),
        "var": (torch.rand(shape, generator=generator) * 0.9 + 0.05).requires_grad_(),
        "anchor_index": torch.randint(0, 70, (classes, anchors), generator=generator),
        "negative_index": torch.randint(-1, 70, (classes, groups, 5), generator=generator),
        "positive": PrototypeStatistics(precision, precision * 0.3, count),
        "virtual_mu": torch.randn(classes, virtual, dim, generator=generator),
    }
    options: dict[str, Any] = {
        "tau": 0.05 * dim,
        "normalize": dim != 33,
        "virtual_known": torch.arange(classes) % 4 != 1,
        "virtual_var": None if points else torch.rand(classes, virtual, dim, generator=generator),
    }
    loss, *grads = of_both(probabilistic_info_nce(**case, **options), case)
    expected, expected_grads = in_float64(**case, **options)
    assert abs(loss.double() - expected) < 1e-5 * expected
    for got, want in zip(grads, expected_grads, strict=True):
        # Accumulated in float32, then rounded once. With one normalised dimension the means' gradient is 0.
        tolerance = 1e-5 + (2 * torch.finfo(dtype).eps if got.dtype == dtype else 0.0)
        assert (got.double() - want.double()).norm() < tolerance * want.double().norm() + 1e-9


@pytest.mark.parametrize("rows", ["virtual_mu", "virtual_var"])
def test_moving_the_prototype_of_a_class_that_is_absent_changes_the_loss(rows: str) -> None:
    case = scene(torch.float32)
    options: dict[str, Any] = {"tau": 1.0, "virtual_known": KNOWN}
    given = {"virtual_mu": case.pop("virtual_mu"), "virtual_var": variances()}
    assert case["positive"].count[4] == 0
    losses = []
    for shift in (0.0, 0.5):
        given[rows] = given[rows].clone()
        given[rows][4] += shift
        losses.append(probabilistic_info_nce(**case, **given, **options))
        expected, _ = in_float64(**case, **given, **options)
        torch.testing.assert_close(losses[-1].double(), expected, rtol=1e-5, atol=0)
    assert (losses[1] - losses[0]).abs() > 1e-3 * losses[0]
    # Not known, it has no say.
    assert (
        probabilistic_info_nce(**case, **given, tau=1.0, virtual_known=KNOWN & (torch.arange(C) != 4))
        != losses[1]
    )


@pytest.mark.parametrize("points", [True, False], ids=["points", "distributions"])
def test_one_class_present_is_set_against_the_virtual_negatives_of_the_others(points: bool) -> None:
    case = present_alone(scene(torch.float32), 3)
    options: dict[str, Any] = {
        "tau": 1.0,
        "virtual_known": KNOWN,
        "virtual_var": None if points else variances(),
    }
    loss, *grads = of_both(probabilistic_info_nce(**case, **options), case)
    expected, expected_grads = in_float64(**case, **options)
    assert loss > 0.1
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for got, want in zip(grads, expected_grads, strict=True):
        assert want.norm() > 0
        assert (got - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("known", [None, [3], []], ids=["default", "its_own", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_anchor_without_any_negative_has_a_loss_of_zero(
    dtype: torch.dtype, known: list[int] | None
) -> None:
    case = present_alone(scene(dtype), 3)
    mask = (
        None
        if known is None
        else torch.zeros(C, dtype=torch.bool).index_fill(0, torch.tensor(known).long(), True)
    )
    for virtual in (case["virtual_mu"], None):
        loss = probabilistic_info_nce(**{**case, "virtual_mu": virtual}, tau=0.3, virtual_known=mask)
        assert loss.requires_grad
        values = of_both(loss, case)
        assert all((value == 0).all() for value in values)


def test_one_of_two_anchors_without_a_negative_counts_as_zero() -> None:
    case = scene(torch.float32)
    case["virtual_mu"] = None
    case["negative_index"][0, 2:] = -1
    loss = probabilistic_info_nce(**case, tau=1.0)
    torch.testing.assert_close(loss.double(), in_float64(**case, tau=1.0)[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("hole", [torch.nan, torch.inf])
def test_rows_of_unknown_classes_may_hold_anything(hole: float, normalize: bool) -> None:
    case = scene(torch.float32)
    results = []
    for value in (0.5, hole):
        virtual_mu, virtual_var = case["virtual_mu"].clone(), variances()
        virtual_mu[~KNOWN] = virtual_var[~KNOWN] = value
        loss = probabilistic_info_nce(
            **{**case, "virtual_mu": virtual_mu},
            tau=1.0,
            normalize=normalize,
            virtual_var=virtual_var,
            virtual_known=KNOWN,
        )
        results.append(of_both(loss, case))
    for plain, with_hole in zip(*results, strict=True):
        assert torch.equal(plain, with_hole)


def test_the_classes_present_are_the_known_ones_by_default() -> None:
    case = scene(torch.float32)
    case["virtual_mu"][4] = torch.nan
    present = case["positive"].count > 0
    expected = of_both(probabilistic_info_nce(**case, tau=1.0, virtual_known=present), case)
    got = of_both(probabilistic_info_nce(**case, tau=1.0), case)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_points_are_distributions_of_variance_zero() -> None:
    case = scene(torch.float32)
    options: dict[str, Any] = {"tau": 1.0, "virtual_known": KNOWN}
    expected = of_both(probabilistic_info_nce(**case, **options), case)
    got = of_both(probabilistic_info_nce(**case, **options, virtual_var=torch.zeros(C, V, D)), case)
    for value, want in zip(got, expected, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-6, atol=1e-8)


def test_the_variances_of_virtual_negatives_are_constants() -> None:
    case = scene(torch.float32)
    virtual_mu, virtual_var = case.pop("virtual_mu").requires_grad_(), variances().requires_grad_()
    loss = probabilistic_info_nce(
        **case, virtual_mu=virtual_mu, virtual_var=virtual_var, virtual_known=KNOWN, tau=1.0
    )
    grads = torch.autograd.grad(loss, (case["mu"], virtual_mu, virtual_var), allow_unused=True)
    assert grads[0].norm() > 0
    assert grads[1] is None
    assert grads[2] is None


def test_tiny_variances_of_anchor_and_virtual_negatives_are_clamped_alike() -> None:
    case = scene(torch.float32)
    index = int(case["anchor_index"][3, 0])
    with torch.no_grad():
        case["var"].flatten(2)[index // 20, 1, index % 20] = 0.0
    virtual_var = variances()
    virtual_var[:, 1:, 1] = 0.0
    options: dict[str, Any] = {"tau": 1e12, "virtual_var": virtual_var, "virtual_known": KNOWN}
    loss, *grads = of_both(probabilistic_info_nce(**case, **options), case)
    expected, expected_grads = in_float64(**case, **options)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for got, want in zip(grads, expected_grads, strict=True):
        assert torch.isfinite(got).all()
        assert (got.double() - want).norm() < 1e-4 * want.norm()


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's own maximum
@pytest.mark.parametrize("rows", ["virtual_mu", "virtual_var"])
def test_a_known_row_that_is_nan_makes_the_loss_nan(rows: str) -> None:
    case = scene(torch.float32)
    given = {"virtual_mu": case.pop("virtual_mu"), "virtual_var": variances()}
    given[rows][4, 1, 2] = torch.nan
    assert probabilistic_info_nce(**case, **given, virtual_known=KNOWN, tau=1.0).isnan()
