"""The probability head's tail through every backend, against PyTorch's own operations in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prcl_fast import ops
from support.backends import run_everywhere, skip_on_one_thread

place = run_everywhere("variance_head")

FORMATS = [torch.channels_last, torch.contiguous_format]
# One vector of channels and less, whole ones and not, several slices of them; one run of rows, and many.
SHAPES = [(2, 7, 5, 6), (1, 1, 2, 1), (3, 64, 4, 5), (2, 300, 3, 3), (2, 5, 33, 41), (1, 256, 1, 9)]
# Of the gradient in x's type: its rounding to the nearest, or some roundings of float32.
GRADIENT_ERROR = {torch.float32: 3e-6, torch.bfloat16: 2.2e-3, torch.float16: 4e-4, torch.float64: 1e-13}
_CUT_OFF = 4.4e-3  # Triton's interpreter cuts bfloat16 off instead


def gradient_error(dtype: torch.dtype, place: tuple[str, str]) -> float:
    interpreted = place == ("cpu", "triton")
    return _CUT_OFF if interpreted and dtype == torch.bfloat16 else GRADIENT_ERROR[dtype]


def variance_head(*values: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """sigma^2 and the running statistics after it; the arguments stay as they are."""
    *leaves, running_mean, running_var = values
    running = running_mean.clone(), running_var.clone()
    return ops.variance_head(*leaves, *running, **options), *running


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, gamma, beta and the running statistics, with a scale and a shift of each channel's own."""
    generator = torch.Generator().manual_seed(sum(shape))
    dims = shape[1]

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x = normal(*shape) * normal(dims, 1, 1).exp() + 3 * normal(dims, 1, 1)
    work = torch.promote_types(dtype, torch.float32)
    values = x.to(dtype), torch.tensor([1.7]), torch.tensor([-0.6]), normal(dims), normal(dims).exp()
    return tuple(value.to(work if i else dtype) for i, value in enumerate(values))


def composition(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    running = mean.clone(), var.clone()
    z = gamma * F.batch_norm(x, *running, training=training) + beta
    return torch.sigmoid(torch.logaddexp(z, torch.full_like(z, math.log(1e-6)))), *running


def exact(values: tuple[Tensor, ...], training: bool, grad: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """sigma^2 and running statistics, and the gradients of x, gamma and beta."""
    leaves = [value.double().requires_grad_(i < 3) for i, value in enumerate(values)]
    found = composition(*leaves, training)
    return [value.detach() for value in found], list(torch.autograd.grad(found[0], leaves[:3], grad.double()))


def run(values: tuple[Tensor, ...], grad: Tensor, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [value.detach().requires_grad_(i < 3) for i, value in enumerate(values)]
    found = variance_head(*leaves, **options)
    return [value.detach() for value in found], list(
        torch.autograd.grad(found[0], leaves[:3], grad.to(found[0].dtype))
    )


def error(value: Tensor, expected: Tensor) -> float:
    """Relative L2; absolute where the expected vector is itself only rounding."""
    return float((value.double() - expected).norm() / expected.norm().clamp_min(1e-6))


def weights(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS, ids=["rows", "planes"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", GRADIENT_ERROR, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_variance_gradients_and_running_statistics_equal_float64(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    memory_format: torch.memory_format,
    training: bool,
    place: tuple[str, str],
) -> None:
    values = draw(shape, dtype)
    values = values[0].contiguous(memory_format=memory_format), *values[1:]
    found, gradients = run(values, weights(shape), training=training)
    expected, expected_gradients = exact(values, training, weights(shape))
    work = torch.promote_types(dtype, torch.float32)
    assert [value.dtype for value in (*found, *gradients)] == [work] * 3 + [dtype, work, work]
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    for value, target in zip(found, expected, strict=True):
        torch.testing.assert_close(value.double(), target, rtol=tolerance, atol=tolerance / 10)
    if shape[0] * shape[2] * shape[3] == 2 and training:
        # xhat of two pixels is +-1 whatever they are: what eps leaves of the gradient is no number to hold.
        gradients, expected_gradients = gradients[1:], expected_gradients[1:]
    for value, target in zip(gradients, expected_gradients, strict=True):
        # Those of gamma and beta are sums of terms of either sign, which cancel.
        bound = gradient_error(dtype, place) if value.dim() == 4 else 10 * tolerance
        assert error(value, target) < bound


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dims", [16, 37])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_may_have_the_type_of_x(
    dtype: torch.dtype, dims: int, training: bool, place: tuple[str, str]
) -> None:
    shape = (2, dims, 5, 9)
    values = draw(shape, dtype)
    grad = weights(shape).to(dtype)
    (var, *_), gradients = run(values, grad, training=training, dtype=dtype)
    (expected, *_), expected_gradients = exact(values, training, grad)
    assert var.dtype == dtype
    torch.testing.assert_close(
        var, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-7, check_dtype=False
    )
    assert [value.dtype for value in gradients] == [dtype, torch.float32, torch.float32]
    bounds = (gradient_error(dtype, place), 3e-5, 3e-5)
    for value, target, bound in zip(gradients, expected_gradients, bounds, strict=True):
        assert error(value, target) < bound


@pytest.mark.parametrize("outlier", [False, True])
def test_moments_far_from_zero_keep_their_digits(outlier: bool) -> None:
    x, gamma, beta, mean, var = draw((3, 21, 40, 11))
    x = 1e4 + x
    if outlier:
        x[0, :, 0, 0] = -1e4
    options = {"training": True, "momentum": 1.0}
    _, found_mean, found_var = variance_head(x, gamma, beta, mean, var, **options)
    torch.testing.assert_close(found_mean.double(), x.double().mean((0, 2, 3)), rtol=3e-7, atol=0)
    # An outlier as the first value of a run of 32 multiplies the rounding of the run's sums by 32.
    rtol = 2e-5 if outlier else 5e-6
    torch.testing.assert_close(found_var.double(), x.double().var((0, 2, 3)), rtol=rtol, atol=0)


def test_channels_that_do_not_vary_have_no_variance() -> None:
    x, gamma, beta, mean, var = draw((2, 9, 20, 30))
    x = x[:1, :, :1, :1].expand_as(x).contiguous()
    found, found_mean, found_var = variance_head(x, gamma, beta, mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(found_mean, x[0, :, 0, 0], rtol=2e-7, atol=0)
    assert found_var.max() < 1e-10
    torch.testing.assert_close(found, beta.sigmoid().expand_as(found), rtol=0, atol=1e-4)


@pytest.mark.parametrize("beta", [-1e30, -1e4, -200.0, -90.0, -30.0, 0.0, 30.0, 90.0, 200.0, 1e4, 1e30])
def test_extreme_logits_keep_variance_and_gradients_finite(beta: float) -> None:
    x, gamma, _, mean, var = draw((2, 19, 5, 7))
    values = x, gamma, torch.tensor([beta]), mean, var
    (found, *_), gradients = run(values, torch.ones_like(x), training=True)
    assert found.min() > 0.99e-6
    assert found.max() <= 1
    assert all(value.isfinite().all() for value in gradients)
    if abs(beta) > 1e3:
        assert not any(value.any() for value in gradients)
        limit = torch.full_like(found, 1.0 if beta > 0 else 1e-6)
        torch.testing.assert_close(found, limit, rtol=2e-6, atol=0)


def test_a_gain_of_zero_gives_x_no_gradient() -> None:
    x, _, beta, mean, var = draw((2, 5, 6, 7))
    values = x, torch.zeros(1), beta, mean, var
    (found, *_), (grad_x, grad_gamma, _) = run(values, weights(x.shape), training=True)
    _, expected = exact(values, True, weights(x.shape))
    torch.testing.assert_close(found, beta.sigmoid().expand_as(found), rtol=3e-6, atol=0)
    assert not grad_x.any()
    assert error(grad_gamma, expected[1]) < 3e-5


# Bits beyond those of the one that arithmetic makes.
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, -1])
def test_nan_stays_in_its_pixel_in_evaluation_and_fills_its_channel_in_training(bits: int) -> None:
    x, *rest = draw((2, 21, 3, 4))
    x[1, 17, 2, 1] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    found, *_ = variance_head(x, *rest, training=False)
    assert torch.equal(found.isnan(), x.isnan())
    found, *_ = variance_head(x, *rest, training=True)
    assert torch.equal(found.isnan().any(3).any(2).any(0), torch.arange(21) == 17)
    assert found[:, 17].isnan().all()


def test_result_and_gradient_have_the_memory_format_of_x() -> None:
    values = draw((2, 6, 5, 7))
    plain, rows = values[0], values[0].contiguous(memory_format=torch.channels_last)
    strided = torch.cat([plain, plain], dim=3)[..., ::2]
    for x, expected in ((plain, torch.contiguous_format), (rows, FORMATS[0]), (strided, FORMATS[0])):
        leaf = x.detach().requires_grad_()
        found, *_ = variance_head(leaf, *values[1:], training=True)
        (grad,) = torch.autograd.grad(found, leaf, weights(x.shape))
        assert found.is_contiguous(memory_format=expected)
        if x is not strided:  # autograd gives it the strides of its leaf
            assert grad.is_contiguous(memory_format=expected)


def test_the_number_of_threads_does_not_change_a_bit(place: tuple[str, str]) -> None:
    skip_on_one_thread(*place)
    if place[1] == "torch":
        pytest.skip("PyTorch's sums depend on the number of threads")
    values = draw((2, 19, 40, 50))
    first = run(values, weights(values[0].shape), training=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        second = run(values, weights(values[0].shape), training=True)
    finally:
        torch.set_num_threads(threads)
    for value, again in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(value, again)


def test_evaluation_leaves_the_running_statistics_alone() -> None:
    values = draw((2, 6, 5, 7))
    _, mean, var = variance_head(*values, training=False)
    assert torch.equal(mean, values[3])
    assert torch.equal(var, values[4])


def test_statistics_of_several_batches_make_one() -> None:
    """The first four images here and the last two elsewhere give what all six give at once."""
    x, *rest = draw((6, 11, 5, 7))
    grad = weights(x.shape)
    (whole, *running), (grad_x, *_) = run((x, *rest), grad, training=True)
    other = x[4:].double()
    xhat = F.batch_norm(x.double(), None, None, training=True)
    z = rest[0].double() * xhat + rest[1].double()
    odds = z.exp() / (1 + 1e-6 + z.exp()).square()
    dz = (grad.double() * odds)[4:]
    elsewhere = torch.stack([dz.sum((0, 2, 3)), (dz * xhat[4:]).sum((0, 2, 3))])

    def merged_moments(mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        device, rows = mean.device, len(other) * 35
        far = other.to(device)
        far_var, far_mean = torch.var_mean(far, (0, 2, 3), correction=0)
        counts = torch.tensor([[count], [rows]], dtype=torch.float64, device=device)
        means, variances = torch.stack([mean, far_mean]), torch.stack([var, far_var])
        centre = (counts * means).sum(0) / counts.sum()
        spread = (counts * (variances + (means - centre).square())).sum(0) / counts.sum()
        return centre, spread, counts.sum()

    collectives = ops.Collectives(merged_moments, lambda sums: sums + elsewhere.to(sums))
    (part, *part_running), (part_grad_x, *_) = run(
        (x[:4], *rest), grad[:4], training=True, collectives=collectives
    )
    torch.testing.assert_close(part, whole[:4], rtol=3e-6, atol=1e-7)
    torch.testing.assert_close(part_grad_x, grad_x[:4], rtol=3e-5, atol=1e-6)
    for value, target in zip(part_running, running, strict=True):
        torch.testing.assert_close(value, target, rtol=1e-6, atol=1e-6)


def test_wrong_arguments_are_named() -> None:
    x, *rest = draw((2, 6, 5, 7))
    call = ops.variance_head
    with pytest.raises(ValueError, match="x must have shape"):
        call(x[0], *rest, training=True)
    with pytest.raises(TypeError, match="x must be float32"):
        call(x.long(), *rest, training=True)
    with pytest.raises(ValueError, match="at least one channel"):
        call(x[:, :0], *rest, training=True)
    with pytest.raises(ValueError, match=r"gamma must have shape \[1\]"):
        call(x, torch.ones(6), *rest[1:], training=True)
    with pytest.raises(ValueError, match=r"running_var must have shape \[6\]"):
        call(x, *rest[:3], torch.ones(5), training=True)
    with pytest.raises(ValueError, match="more than one pixel in training"):
        call(x[:1, :, :1, :1], *rest, training=True)
    with pytest.raises(TypeError, match="dtype must be"):
        call(x, *rest, training=True, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS, ids=["rows", "planes"])
def test_opcheck(memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    x, gamma, beta, mean, var = draw((2, 6, 5, 7), dtype)
    x = x.contiguous(memory_format=memory_format)
    grad, means = weights(x.shape), weights((2, 6))
    registered = torch.ops.prcl_fast
    shared = mean, var, gamma, beta
    torch.library.opcheck(registered.variance_head_moments.default, (x,))
    torch.library.opcheck(registered.variance_head.default, (x, *shared, 1e-5, torch.float32))
    torch.library.opcheck(registered.variance_head_backward_sums.default, (grad, x, *shared, 1e-5))
    for given in (means, None):
        torch.library.opcheck(registered.variance_head_backward.default, (grad, x, *shared, given, 1e-5))


@pytest.mark.parametrize("training", [True, False])
def test_compile_in_one_graph(training: bool) -> None:
    values = draw((2, 6, 5, 7))
    grad = weights(values[0].shape)

    def call(*arguments: Tensor) -> Tensor:
        return ops.variance_head(*arguments, training=training)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for function in (call, compiled):
        leaves = [value.clone().requires_grad_(i < 3) for i, value in enumerate(values)]
        found = function(*leaves)
        results.append((found, *leaves[3:], *torch.autograd.grad(found, leaves[:3], grad)))
    for value, target in zip(*results, strict=True):
        assert torch.equal(value, target)
