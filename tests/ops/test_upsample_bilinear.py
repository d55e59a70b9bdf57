"""Bilinear upsampling: value, gradient, memory formats, the same bits from run to run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prcl_fast.ops import upsample_bilinear
from support.backends import run_everywhere, skip_on_one_thread

place = run_everywhere("upsample_bilinear")

FORMATS = [torch.channels_last, torch.contiguous_format]
# (B, C, h, w) -> (H, W): the decoder's, odd ones, one row or column, equal, smaller, a factor without end
SIZES = [
    ((2, 16, 4, 6), (16, 24)),
    ((3, 37, 5, 7), (19, 23)),
    ((2, 8, 1, 1), (5, 7)),
    ((1, 5, 1, 6), (9, 1)),
    ((2, 24, 6, 5), (6, 5)),
    ((2, 3, 9, 8), (4, 3)),
    ((1, 8, 3, 300), (4, 3)),  # most input columns touch no output
    ((1, 2, 2, 1), (3, 90)),
    ((1, 130, 9, 7), (17, 29)),
    ((2, 1, 4, 5), (1, 11)),
]


def features(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
    seed: int = 0,
) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    # Tensor.contiguous would leave a map of one pixel as it is.
    return torch.empty(shape, dtype=dtype, memory_format=layout).copy_(values)


def exact(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient in float64."""
    leaf = x.detach().double().requires_grad_()
    y = F.interpolate(leaf, grad.shape[2:], mode="bilinear", align_corners=True)
    return y.detach(), torch.autograd.grad(y, leaf, grad.double())[0]


def value_and_gradient(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    y = upsample_bilinear(leaf, grad.shape[2:])
    return y.detach(), torch.autograd.grad(y, leaf, grad)[0]


def far_apart(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("shape", "size"), SIZES)
def test_value_and_gradient_agree_with_float64(
    shape: tuple[int, ...], size: tuple[int, int], layout: torch.memory_format
) -> None:
    x = features(shape, layout=layout)
    grad = features((*shape[:2], *size), seed=1, layout=layout)
    got = value_and_gradient(x, grad)
    # float32 holds a position between two inputs of a wide map less closely.
    tolerance = max(1e-6, 4 * max(shape[2:]) * 2.0**-24)
    for value, expected in zip(got, exact(x, grad), strict=True):
        assert far_apart(value, expected) < tolerance
        assert value.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", FORMATS)
def test_float64_is_computed_in_float64(layout: torch.memory_format) -> None:
    x = features((2, 19, 5, 7), torch.float64, layout=layout)
    grad = features((2, 19, 13, 12), torch.float64, seed=1)
    got = value_and_gradient(x, grad)
    for value, expected in zip(got, exact(x, grad), strict=True):
        assert far_apart(value, expected) < 1e-14


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("channels", [16, 21])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_the_result(
    place: tuple[str, str], dtype: torch.dtype, channels: int, layout: torch.memory_format
) -> None:
    roundings = 1.01 if place == ("cpu", "triton") else 0.51  # the interpreter cuts off to bfloat16
    x = features((2, channels, 5, 7), dtype, layout=layout)
    grad = features((2, channels, 19, 26), dtype, seed=1, layout=layout)
    for value, expected in zip(value_and_gradient(x, grad), exact(x, grad), strict=True):
        assert value.dtype == dtype
        torch.testing.assert_close(
            value.double(), expected, rtol=roundings * torch.finfo(dtype).eps, atol=2e-6
        )


def test_slices_and_permuted_maps_are_read_where_they_lie() -> None:
    """The gradient of an operand of a concatenation is a slice of channels."""
    wide, wide_grad = features((2, 40, 5, 7)), features((2, 40, 17, 19), seed=1)
    for layout in FORMATS:
        x = wide.contiguous(memory_format=layout)[:, 8:32]
        grad = wide_grad.contiguous(memory_format=layout)[:, 8:32]
        for other in (grad, grad.contiguous(), grad.transpose(2, 3).contiguous().transpose(2, 3)):
            for value, expected in zip(value_and_gradient(x, other), exact(x, grad), strict=True):
                assert far_apart(value, expected) < 1e-6
                assert value.is_contiguous(memory_format=layout)


def test_gradient_of_a_sum_needs_no_memory_of_its_own() -> None:
    x = features((2, 8, 3, 4), layout=torch.channels_last).requires_grad_()
    (grad,) = torch.autograd.grad(upsample_bilinear(x, (7, 9)).sum(), x)
    ones = torch.ones(2, 8, 7, 9)
    assert far_apart(grad, exact(x, ones)[1]) < 1e-6


@pytest.mark.parametrize("layout", FORMATS)
def test_infinity_and_nan_reach_their_neighbours_alone(layout: torch.memory_format) -> None:
    x = torch.zeros(1, 8, 6, 6).contiguous(memory_format=layout)
    grad = torch.zeros(1, 8, 21, 21).contiguous(memory_format=layout)
    x[0, 1, 2, 3] = float("inf")
    grad[0, 2, 10, 5] = float("nan")
    value, gradient = value_and_gradient(x, grad)
    read = torch.zeros(8, 21, 21, dtype=torch.bool)
    read[1, 4:12, 8:16] = True  # four outputs from one input to the next
    assert not value[0, 1, 8, 12].isfinite()
    assert value[0][~read].isfinite().all()
    touched = torch.zeros(8, 6, 6, dtype=torch.bool)
    touched[2, 2:4, 1:3] = True
    assert gradient[0][touched].isnan().all()
    assert gradient[0][~touched].isfinite().all()


def test_first_and_second_derivatives() -> None:
    x = features((1, 2, 3, 2), torch.float64).requires_grad_()

    def up(x: Tensor) -> Tensor:
        return upsample_bilinear(x, (5, 4))

    assert torch.autograd.gradcheck(up, (x,))
    assert torch.autograd.gradgradcheck(up, (x,))


@pytest.mark.parametrize("layout", FORMATS)
def test_the_tiles_of_a_gpu_give_the_same(
    place: tuple[str, str], layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter has larger tiles, because it takes its time by the operation."""
    if place != ("cpu", "triton"):
        pytest.skip("only interpreted kernels have tiles of their own")
    from prcl_fast.kernels import upsample_bilinear as kernels

    x = features((1, 10, 9, 11), layout=layout)
    grad = features((1, 10, 14, 18), layout=layout, seed=1)
    expected = value_and_gradient(x, grad)
    monkeypatch.setattr(kernels, "_TILE", (8, 8))
    monkeypatch.setattr(kernels, "_PLANE_TILE", (8, 4))
    assert all(map(torch.equal, value_and_gradient(x, grad), expected))


@pytest.mark.parametrize("layout", FORMATS)
def test_the_same_call_gives_the_same_bits(layout: torch.memory_format) -> None:
    x = features((2, 24, 5, 6), layout=layout)
    grad = features((2, 24, 19, 17), seed=1, layout=layout)
    first = value_and_gradient(x, grad)
    for _ in range(2):
        assert all(map(torch.equal, value_and_gradient(x, grad), first))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_for_any_number_of_threads(
    place: tuple[str, str], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    skip_on_one_thread(*place)
    x = features((3, 48, 15, 16), dtype, layout=layout)
    grad = features((3, 48, 64, 64), dtype, seed=1, layout=layout)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        results.append(value_and_gradient(x, grad))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_one_image_has_the_bits_that_it_has_in_a_batch() -> None:
    x = features((2, 16, 7, 5), layout=torch.channels_last)
    grad = features((2, 16, 13, 11), seed=1, layout=torch.channels_last)
    whole = value_and_gradient(x, grad)
    for b in range(2):
        alone = value_and_gradient(x[b : b + 1], grad[b : b + 1])
        assert all(torch.equal(one[0], many[b]) for one, many in zip(alone, whole, strict=True))


def test_format_of_a_map_of_one_pixel_is_that_of_its_strides() -> None:
    x = features((2, 8, 1, 1))
    last = x.as_strided((2, 8, 1, 1), (8, 1, 8, 8))
    assert upsample_bilinear(x, (2, 3)).is_contiguous()
    assert upsample_bilinear(last, (2, 3)).is_contiguous(memory_format=torch.channels_last)


def test_autocast_leaves_the_dtype() -> None:
    x = features((1, 8, 3, 4), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert upsample_bilinear(x, (5, 6)).dtype == torch.bfloat16
        assert torch.equal(upsample_bilinear(x.float(), (3, 4)), x.float())


def test_wrong_arguments_are_named() -> None:
    x = features((1, 2, 3, 4))
    with pytest.raises(TypeError, match="x must be float32, bfloat16, float16, float64; got int64"):
        upsample_bilinear(x.long(), (5, 6))
    with pytest.raises(ValueError, match=r"x must have shape \[B, C, h, w\]"):
        upsample_bilinear(x[0], (5, 6))
    with pytest.raises(ValueError, match="x must hold between 1"):
        upsample_bilinear(x[:0], (5, 6))
    with pytest.raises(ValueError, match=r"size must be \(H, W\)"):
        upsample_bilinear(x, (5,))
    with pytest.raises(ValueError, match="size must be at least 1"):
        upsample_bilinear(x, (5, 0))
    with pytest.raises(TypeError, match="size must be an integer"):
        upsample_bilinear(x, (5, 6.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", FORMATS)
def test_opcheck(layout: torch.memory_format) -> None:
    last = layout == torch.channels_last
    x = features((2, 5, 3, 4), layout=layout).requires_grad_()
    grad = features((2, 5, 7, 6)).requires_grad_()
    torch.library.opcheck(torch.ops.prcl_fast.upsample_bilinear.default, (x, 7, 6, last))
    torch.library.opcheck(torch.ops.prcl_fast.upsample_bilinear_backward.default, (grad, 3, 4, last))


@pytest.mark.parametrize("layout", FORMATS)
def test_compiles_whole_with_its_backward_pass(layout: torch.memory_format) -> None:
    x = features((2, 5, 3, 4), layout=layout).requires_grad_()
    low = features((2, 3, 7, 6), layout=layout)

    def run(x: Tensor) -> Tensor:
        up = upsample_bilinear(x * 1.0, low.shape[2:])
        return torch.cat([low, up], dim=1).square().sum()

    (expected,) = torch.autograd.grad(run(x), x)
    (got,) = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(got, expected)
    assert got.stride() == expected.stride()
