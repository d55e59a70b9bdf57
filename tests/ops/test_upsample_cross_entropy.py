"""Cross-entropy of upsampled logits: value, gradient, weights, ignored pixels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prcl_fast.ops import upsample_cross_entropy
from support.backends import run_everywhere, skip_on_one_thread

place = run_everywhere("upsample_cross_entropy")

B, C, H, W = 3, 6, 19, 23


def scene(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(B, C, 5, 6, generator=generator)).to(dtype).requires_grad_()
    target = torch.randint(0, C, (B, H, W), generator=generator)
    target[torch.rand(B, H, W, generator=generator) < 0.3] = 255
    target[1, :9] = 255
    return logits, target


def by_hand(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    reduction: str = "mean",
) -> Tensor:
    full = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=True)
    loss = F.cross_entropy(full, target, ignore_index=ignore_index, reduction="none")
    if weight is not None:
        loss = loss * (weight if weight.dim() == 3 else weight[:, None, None])
    return loss.sum() / ((target != ignore_index).sum() if reduction == "mean" else 1)


@pytest.mark.parametrize("weight", [None, (B,), (B, H, W)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_gradient_equal_upsampling_then_cross_entropy(
    dtype: torch.dtype, reduction: str, weight: tuple[int, ...] | None
) -> None:
    logits, target = scene(dtype)
    exact = logits.detach().double().requires_grad_()
    options: dict[str, Any] = {"reduction": reduction}
    if weight is not None:
        options["weight"] = torch.rand(
            weight, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
    expected = by_hand(exact, target, **options)
    (expected_grad,) = torch.autograd.grad(expected, exact)
    loss = upsample_cross_entropy(logits, target, **options)
    (grad,) = torch.autograd.grad(0.5 * loss, logits)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert abs(loss.double() - expected) < tolerance * expected
    assert (grad.double() - 0.5 * expected_grad).norm() < tolerance * expected_grad.norm()


def test_gradcheck() -> None:
    logits, target = scene()
    small = logits.detach()[:1, :3, :3, :2].clone().requires_grad_()
    labels = target[:1, :7, :5].clamp(max=2)
    labels[0, 0, :2] = 255
    assert torch.autograd.gradcheck(lambda x: upsample_cross_entropy(x, labels), (small,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions_accumulate_in_float32(dtype: torch.dtype) -> None:
    logits, target = scene(dtype)
    exact = logits.detach().double().requires_grad_()
    expected = by_hand(exact, target)
    expected.backward()
    loss = upsample_cross_entropy(logits, target.to(torch.uint8))
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.double() - expected) < 1e-5 * expected
    assert logits.grad.dtype == dtype
    error = (logits.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 1e-5 + torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("classes", "size", "full"),
    [
        (2, (1, 1), (5, 7)),
        (21, (3, 40), (9, 157)),
        (7, (6, 5), (6, 5)),
        (3, (9, 8), (4, 3)),
        (40, (2, 3), (33, 2)),
        (1, (4, 4), (8, 8)),
        (19, (33, 5), (131, 19)),
        (3, (3, 700), (4, 3)),  # most input columns touch no output
        (2, (1, 1), (5, 700)),
        (3, (4, 5), (4, 1)),
    ],
)
def test_any_sizes_and_classes_agree_with_float64(
    classes: int, size: tuple[int, int], full: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = (3 * torch.randn(2, classes, *size, generator=generator)).requires_grad_()
    target = torch.randint(0, classes, (2, *full), generator=generator)
    target[torch.rand(2, *full, generator=generator) < 0.2] = 255
    weight = torch.rand(2, generator=generator)
    exact = logits.detach().double().requires_grad_()
    expected = by_hand(exact, target, weight.double())
    (expected_grad,) = torch.autograd.grad(expected, exact)
    # float32 holds a position between two inputs of a wide map less closely.
    tolerance = max(1e-5, 4 * max(size) * 2.0**-24)
    for x in (logits, logits.detach().contiguous(memory_format=torch.channels_last).requires_grad_()):
        loss = upsample_cross_entropy(x, target, weight=weight)
        (grad,) = torch.autograd.grad(loss, x)
        assert abs(loss.double() - expected) <= tolerance * expected
        assert (grad.double() - expected_grad).norm() <= tolerance * expected_grad.norm() + 1e-12


@pytest.mark.parametrize("width", [6, 1])  # the outputs of a single column are more than a tile's threads
def test_the_tiles_of_a_gpu_give_the_same(
    place: tuple[str, str], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter has larger tiles, because it takes its time by the operation."""
    if place != ("cpu", "triton"):
        pytest.skip("only interpreted kernels have tiles of their own")
    from prcl_fast.kernels import upsample_cross_entropy as kernels

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 4, width, generator=generator)
    target = torch.randint(0, 5, (2, 9, 150), generator=generator)
    results = []
    for span, columns in ((kernels._SPAN, kernels._COLUMNS), (64, 16)):
        monkeypatch.setattr(kernels, "_SPAN", span)
        monkeypatch.setattr(kernels, "_COLUMNS", columns)
        x = logits.detach().requires_grad_()
        loss = upsample_cross_entropy(x, target)
        results.append((loss, *torch.autograd.grad(loss, x)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


def test_the_same_call_gives_the_same_bits_for_any_number_of_threads(place: tuple[str, str]) -> None:
    skip_on_one_thread(*place)
    logits, target = (torch.cat([part] * 4) for part in scene(torch.float32))
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        x = logits.detach().requires_grad_()
        loss = upsample_cross_entropy(x, target)
        results.append((loss, *torch.autograd.grad(loss, x)))
    torch.set_num_threads(threads)
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_float16_gradient_survives_loss_scaling() -> None:
    logits, target = scene(torch.float16)
    small = torch.full((B,), 1e-6)
    (grad,) = torch.autograd.grad(65536.0 * upsample_cross_entropy(logits, target, weight=small), logits)
    exact = logits.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(65536.0 * by_hand(exact, target, weight=small.double()), exact)
    assert (grad.double() - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_ignored_gives_a_zero_that_stays_in_the_graph(reduction: str) -> None:
    logits, target = scene(torch.float32)
    loss = upsample_cross_entropy(logits, torch.full_like(target, 255), reduction=reduction)
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_ignore_index_may_be_any_value() -> None:
    logits, target = scene(torch.float32)
    expected = upsample_cross_entropy(logits, target)
    assert upsample_cross_entropy(logits, torch.where(target == 255, -1, target), ignore_index=-1) == expected


def test_mean_divides_by_pixels_and_not_by_weights() -> None:
    logits, target = scene(torch.float32)
    weight = torch.full((B,), 0.25)
    loss = upsample_cross_entropy(logits, target, weight=weight)
    torch.testing.assert_close(loss, 0.25 * upsample_cross_entropy(logits, target))


def test_wrong_arguments_are_named() -> None:
    logits, target = scene()
    with pytest.raises(ValueError, match="target must have shape"):
        upsample_cross_entropy(logits, target[:1])
    with pytest.raises(TypeError, match="target must be uint8, int64"):
        upsample_cross_entropy(logits, target.int())
    with pytest.raises(ValueError, match="weight must have shape"):
        upsample_cross_entropy(logits, target, weight=torch.ones(B, H))
    with pytest.raises(ValueError, match="weight must have shape"):
        upsample_cross_entropy(logits, target, weight=torch.ones(B + 1))
    with pytest.raises(ValueError, match="reduction must be sum or mean"):
        upsample_cross_entropy(logits, target, reduction="none")
    with pytest.raises(TypeError, match="logits must be"):
        upsample_cross_entropy(logits.long(), target)


@pytest.mark.parametrize("weight", [None, (B,)])
def test_opcheck(weight: tuple[int, ...] | None) -> None:
    logits, target = scene(torch.float32)
    weights = None if weight is None else torch.ones(weight)
    op = torch.ops.prcl_fast.upsample_cross_entropy.default
    torch.library.opcheck(op, (logits, target, weights, 255, True, True))


def test_compiles_whole_with_its_backward_pass() -> None:
    logits, target = scene(torch.float32)

    def run(x: Tensor) -> Tensor:
        return upsample_cross_entropy(x * 1.0, target)

    (expected,) = torch.autograd.grad(run(logits), logits)
    (got,) = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(logits), logits)
    torch.testing.assert_close(got, expected)
