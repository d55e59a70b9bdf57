"""The contrast's InfoNCE: value and gradients against eq. (15) and against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prcl_fast.ops import PrototypeStatistics, probabilistic_info_nce
from support.backends import run_everywhere
from support.info_nce_scene import B, C, H, W, by_hand, by_reference, in_float64, scene

place = run_everywhere("probabilistic_info_nce")


CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize("virtual", [True, False])
@pytest.mark.parametrize(
    ("reduction", "normalize", "tau"),
    [("sum", False, 2.0), ("mean", True, 0.1), ("sum", True, 0.5), ("mean", False, 1.0)],
)
def test_loss_and_gradients_equal_the_equation(
    reduction: str, normalize: bool, tau: float, virtual: bool
) -> None:
    case = scene()
    if not virtual:
        case["virtual_mu"] = None
    options: dict[str, Any] = {"tau": tau, "reduction": reduction, "normalize": normalize}
    expected = by_hand(case, **options)
    expected_grads = torch.autograd.grad(expected, (case["mu"], case["var"]))
    for loss in (probabilistic_info_nce(**case, **options), by_reference(**case, **options)):
        grads = torch.autograd.grad(3 * loss, (case["mu"], case["var"]))
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        for got, want in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(got, 3 * want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    "layouts",
    [(CONTIGUOUS, CONTIGUOUS), (CHANNELS_LAST, CHANNELS_LAST), (CHANNELS_LAST, CONTIGUOUS)],
    ids=["contiguous", "channels_last", "one_of_each"],
)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_lower_precisions_accumulate_in_float32(
    dtypes: tuple[torch.dtype, torch.dtype], layouts: tuple[torch.memory_format, torch.memory_format]
) -> None:
    case = scene(*dtypes)
    for name, layout in zip(("mu", "var"), layouts, strict=True):
        case[name] = case[name].detach().contiguous(memory_format=layout).requires_grad_()
    options: dict[str, Any] = {"tau": 0.5, "reduction": "sum", "normalize": True}
    expected, expected_grads = in_float64(*case.values(), **options)
    loss = probabilistic_info_nce(**case, **options)
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.double() - expected) < 1e-5 * expected
    for name, dtype, layout, want in zip(("mu", "var"), dtypes, layouts, expected_grads, strict=True):
        grad = case[name].grad
        assert grad.dtype == dtype
        assert grad.is_contiguous(memory_format=layout)
        # Accumulated in float32, then rounded once to the dtype.
        tolerance = 1e-5 + torch.finfo(dtype).eps
        assert (grad.double() - want).norm() < tolerance * want.norm()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_of_anchors_may_share_their_negatives(groups: int) -> None:
    case = scene(torch.float32)
    case["anchor_index"] = torch.cat([case["anchor_index"], case["anchor_index"][:, :1]], dim=1)  # A = 8
    shared = case["negative_index"][:, :groups]
    options: dict[str, Any] = {"tau": 0.5, "reduction": "mean", "normalize": True}
    results = []
    for negatives in (shared, shared.repeat_interleave(8 // groups, dim=1)):
        mu, var = (case[name].detach().clone().requires_grad_() for name in ("mu", "var"))
        loss = probabilistic_info_nce(
            **{**case, "mu": mu, "var": var, "negative_index": negatives}, **options
        )
        loss.backward()
        results.append((loss, mu.grad, var.grad))
    for got, expected in zip(*results, strict=True):
        assert (got - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize(
    ("classes", "anchors", "negatives", "dim"),
    [
        (2, 1, 1, 1),
        (3, 2, 5, 3),
        (4, 9, 33, 8),
        (6, 3, 17, 33),
        (3, 5, 70, 64),
        (3, 4, 8, 100),
        (2, 3, 9, 300),
    ],
)
@pytest.mark.parametrize(
    ("normalize", "dtype"), [(True, torch.float32), (False, torch.float32), (True, torch.bfloat16)]
)
def test_odd_sizes_agree_with_float64(
    classes: int, anchors: int, negatives: int, dim: int, normalize: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(dim)
    pixels = 2 * 7 * 5
    mu = torch.randn(2, dim, 7, 5, generator=generator).to(dtype)
    var = torch.rand(2, dim, 7, 5, generator=generator) * 0.9 + 0.05
    anchor_index = torch.randint(0, pixels, (classes, anchors), generator=generator)
    negative_index = torch.randint(0, pixels, (classes, anchors, negatives), generator=generator)
    precision = torch.rand(classes, dim, generator=generator) + 0.5
    positive = PrototypeStatistics(precision, precision * mu[0, :, 0, 0].float(), torch.ones(classes).long())
    virtual_mu = torch.randn(classes, 2, dim, generator=generator)
    arguments = (anchor_index, negative_index, positive, virtual_mu)
    options: dict[str, Any] = {"tau": 0.05 * dim, "normalize": normalize}
    leaves = [x.requires_grad_() for x in (mu, var)]
    loss = probabilistic_info_nce(*leaves, *arguments, **options)
    grads = torch.autograd.grad(loss, leaves)
    expected, expected_grads = in_float64(*leaves, *arguments, **options)
    assert abs(loss.item() - expected.item()) < 1e-5 * expected.item()
    for got, want in zip(grads, expected_grads, strict=True):
        tolerance = 1e-5 + (torch.finfo(dtype).eps if got.dtype == dtype else 0.0)
        # With one normalised dimension the means' gradient is 0.
        assert (got.double() - want).norm() < tolerance * want.norm() + 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST])
def test_given_norms_change_neither_loss_nor_gradients(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """One mean that is drawn is zero: below the clamp its norm counts as a constant either way."""
    case = scene(dtype)
    mu = case["mu"].detach()
    image, place = divmod(int(case["anchor_index"][0, 0]), H * W)
    mu.flatten(2)[image, :, place] = 0.0
    case["mu"] = mu.contiguous(memory_format=memory_format).requires_grad_()
    work = torch.float64 if dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(mu, dim=1, dtype=work).clamp(min=1e-12)
    drawn = torch.cat([case["anchor_index"].flatten(), case["negative_index"].flatten()])
    counts = torch.zeros(B * H * W, dtype=torch.bool).index_fill(0, drawn[drawn >= 0], True).view(B, H, W)
    given = torch.where(counts, 1 / norm, 0.0)
    options: dict[str, Any] = {"tau": 0.5, "reduction": "mean", "normalize": True}
    results = []
    for inverse_norm in (None, given):
        loss = probabilistic_info_nce(**case, **options, inverse_norm=inverse_norm)
        results.append((loss, *torch.autograd.grad(loss, (case["mu"], case["var"]))))
    assert all(torch.isfinite(x).all() for x in results[0])
    for got, expected in zip(*results, strict=True):
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6 + torch.finfo(got.dtype).eps
        torch.testing.assert_close(
            got, expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max())
        )
    # The given norms are used: wrong ones change the loss.
    assert probabilistic_info_nce(**case, **options, inverse_norm=2 * given) != results[0][0]
    plain = probabilistic_info_nce(**case, **{**options, "normalize": False})
    assert torch.equal(
        probabilistic_info_nce(**case, **{**options, "normalize": False}, inverse_norm=given), plain
    )


def test_classes_without_anchors_are_counted_in_the_mean() -> None:
    case = scene(torch.float32)
    loss = probabilistic_info_nce(**case, tau=1.0)
    case["virtual_mu"] = None
    without_virtual = probabilistic_info_nce(**case, tau=1.0)
    positive = case["positive"]
    fewer = PrototypeStatistics(positive.precision, positive.weighted_mean, torch.tensor([3, 5, 0, 9, 0]))
    torch.testing.assert_close(
        probabilistic_info_nce(**{**case, "positive": fewer}, tau=1.0), without_virtual * 4 / 3
    )
    assert loss > without_virtual


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_class_counts_by_its_factor(dtype: torch.dtype) -> None:
    case = scene(dtype)
    options = {"tau": 0.7, "normalize": True}
    factor = torch.tensor([0.5, 2.0, 3.0, 0.0, 1.0], dtype=torch.float64)
    alone = [in_float64(**case, **options, class_factor=one)[0] for one in torch.eye(C).double()]
    torch.testing.assert_close(sum(alone), in_float64(**case, **options)[0])
    loss = probabilistic_info_nce(**case, **options, class_factor=factor)
    expected, expected_gradients = in_float64(**case, **options, class_factor=factor)
    torch.testing.assert_close(expected, (torch.stack(alone) * factor).sum())
    tolerance = {"rtol": 2e-2 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-6}
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for got, want in zip(
        torch.autograd.grad(loss, (case["mu"], case["var"])), expected_gradients, strict=True
    ):
        torch.testing.assert_close(got.double(), want, **tolerance)
