"""Prototypes in natural parameters: their sums over pixels, merging by addition, pixels left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prcl_fast.ops import (
    ClassLists,
    PrototypeStatistics,
    class_lists,
    prototype_statistics,
    use_backend,
)
from support.backends import run_everywhere, skip_on_one_thread

place = run_everywhere("prototype_statistics")

C, D = 5, 12


# Of mu and var.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]


def scene(
    mu_dtype: torch.dtype = torch.float32, var_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Class 4 is absent, class 3 has no valid pixel; some labels are outside the range."""
    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(3, D, 7, 6, generator=generator).to(mu_dtype)
    var = (torch.rand(3, D, 7, 6, generator=generator) + 1e-3).to(var_dtype or mu_dtype)
    label = torch.tensor([0, 1, 2, 3, -1, 255])[torch.randint(0, 6, (3, 7, 6), generator=generator)]
    valid = (torch.rand(3, 7, 6, generator=generator) < 0.7) & (label != 3)
    return mu, var, label, valid


def by_hand(mu: Tensor, var: Tensor, label: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (4), a class at a time, in float64."""
    precision, weighted_mean, count = (
        torch.zeros(C, D).double(),
        torch.zeros(C, D).double(),
        torch.zeros(C).long(),
    )
    for c in range(C):
        member = (label == c) & valid
        s, m = var.double().movedim(1, -1)[member], mu.double().movedim(1, -1)[member]
        precision[c], weighted_mean[c], count[c] = (1 / s).sum(0), (m / s).sum(0), member.sum()
    return precision, weighted_mean, count


def lists_of(label: Tensor, valid: Tensor, hard: Tensor, classes: int) -> ClassLists:
    """Made by the reference, where the tensors lie."""
    with use_backend("torch"):
        return class_lists(label, valid, hard, classes)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_sums_equal_equation_4(
    dtypes: tuple[torch.dtype, torch.dtype], memory_format: torch.memory_format
) -> None:
    mu, var, label, valid = scene(*dtypes)
    mu, var = mu.contiguous(memory_format=memory_format), var.contiguous(memory_format=memory_format)
    got = prototype_statistics(mu, var, label, valid, C)
    precision, weighted_mean, count = by_hand(mu, var, label, valid)
    assert got.precision.dtype == got.weighted_mean.dtype == torch.float32
    # Terms and short sums in float32, a few ulp; terms of both signs may cancel in the second.
    torch.testing.assert_close(got.precision.double(), precision, rtol=5e-7, atol=0)
    size = (1 / var.double()).sum()
    torch.testing.assert_close(got.weighted_mean.double(), weighted_mean, rtol=5e-7, atol=1e-8 * size)
    assert torch.equal(got.count, count)


def test_mean_and_variance_are_those_of_the_local_prototype() -> None:
    mu, var, label, valid = scene()
    got = prototype_statistics(mu, var, label, valid, C)
    precision, weighted_mean, count = by_hand(mu, var, label, valid)
    present = count > 0
    torch.testing.assert_close(got.variance[present].double(), 1 / precision[present], rtol=1e-6, atol=0)
    expected = weighted_mean[present] / precision[present]
    # Terms of about 1 and of both signs make it: an error of a few ulp of theirs is left where they cancel.
    torch.testing.assert_close(got.mean[present].double(), expected, rtol=1e-6, atol=2e-7)
    assert not present[3:].any()
    assert (got.mean[~present] == 0).all()
    assert torch.isposinf(got.variance[~present]).all()


def test_merging_two_parts_equals_the_whole() -> None:
    mu, var, label, valid = scene()
    whole = prototype_statistics(mu, var, label, valid, C)
    first = prototype_statistics(mu[:1], var[:1], label[:1], valid[:1], C)
    rest = prototype_statistics(mu[1:], var[1:], label[1:], valid[1:], C)
    merged = PrototypeStatistics(
        first.precision + rest.precision, first.weighted_mean + rest.weighted_mean, first.count + rest.count
    )
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged.variance, whole.variance, rtol=1e-6, atol=0)
    assert torch.equal(merged.count, whole.count)


def test_pixels_that_do_not_count_may_hold_anything() -> None:
    mu, var, label, valid = scene()
    expected = prototype_statistics(mu, var, label, valid, C)
    out = (~valid | (label < 0) | (label >= C))[:, None].expand_as(mu)
    got = prototype_statistics(mu.masked_fill(out, torch.nan), var.masked_fill(out, 0.0), label, valid, C)
    assert torch.equal(got.precision, expected.precision)
    assert torch.equal(got.weighted_mean, expected.weighted_mean)


def test_a_class_of_many_pixels_keeps_its_precision() -> None:
    """A plain float32 sum of so many terms would be off by more than 1e-6."""
    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(1, 1, 100, 401, generator=generator) + 3
    var = torch.rand(1, 1, 100, 401, generator=generator) + 0.01
    label = torch.zeros(1, 100, 401, dtype=torch.int64)
    got = prototype_statistics(mu, var, label, label == 0, 1)
    assert got.precision.item() == pytest.approx((1 / var.double()).sum().item(), rel=2e-7)
    assert got.weighted_mean.item() == pytest.approx((mu.double() / var.double()).sum().item(), rel=2e-7)
    assert got.count.item() == 40100


def test_the_same_call_gives_the_same_bits_for_any_number_of_threads(place: tuple[str, str]) -> None:
    skip_on_one_thread(*place)
    mu, var, label, valid = (torch.cat([part] * 40) for part in scene())
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(prototype_statistics(mu, var, label, valid, C))
    torch.set_num_threads(threads)
    assert torch.equal(results[0].precision, results[1].precision)
    assert torch.equal(results[0].weighted_mean, results[1].weighted_mean)


@pytest.mark.parametrize("dim", [1, 3, 8, 33, 64, 300])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_dimensions(dim: int, memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(dim)
    mu, var = (torch.rand(2, dim, 5, 13, generator=generator) + 0.1 for _ in range(2))
    mu = mu.to(dtype)
    label = torch.randint(-1, 3, (2, 5, 13), generator=generator)
    mu, var = mu.contiguous(memory_format=memory_format), var.contiguous(memory_format=memory_format)
    got = prototype_statistics(mu, var, label, label > -2, 3)
    for c in range(3):
        s = var.double().movedim(1, -1)[label == c]
        torch.testing.assert_close(got.precision[c].double(), (1 / s).sum(0), rtol=5e-7, atol=0)
        m = mu.double().movedim(1, -1)[label == c]
        torch.testing.assert_close(got.weighted_mean[c].double(), (m / s).sum(0), rtol=5e-7, atol=0)


@pytest.mark.parametrize("classes", [1, 30, 48, 150])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_any_number_of_classes(classes: int, memory_format: torch.memory_format) -> None:
    """On CUDA the table of sums grows with them, past the shared memory that a launch has without asking."""
    generator = torch.Generator().manual_seed(classes)
    mu, var = (torch.rand(2, 8, 16, 16, generator=generator) + 0.1 for _ in range(2))
    label = torch.randint(0, classes, (2, 16, 16), generator=generator)
    mu, var = mu.contiguous(memory_format=memory_format), var.contiguous(memory_format=memory_format)
    got = prototype_statistics(mu, var, label, label >= 0, classes)
    member = torch.nn.functional.one_hot(label.flatten(), classes).double().T
    weight = 1 / var.double().movedim(1, -1).flatten(0, 2)
    mean = weight * mu.double().movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(got.precision.double(), member @ weight, rtol=5e-7, atol=1e-12)
    torch.testing.assert_close(got.weighted_mean.double(), member @ mean, rtol=5e-7, atol=1e-12)


@pytest.mark.parametrize("dim", [1, 12, 300])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2], DTYPES[3], (torch.float64, torch.float64)])
def test_inverse_norms_come_out_of_the_same_pass(
    dtypes: tuple[torch.dtype, torch.dtype], memory_format: torch.memory_format, dim: int
) -> None:
    generator = torch.Generator().manual_seed(dim)
    mu, var = (torch.rand(3, dim, 7, 6, generator=generator) + 0.1 for _ in range(2))
    _, _, label, valid = scene()
    mu = (mu * 10.0 ** torch.randint(-2, 3, (3, 1, 7, 6), generator=generator)).to(dtypes[0])
    image, y, x = ((label == 0) & valid).nonzero()[:3].unbind(1)
    mu[image, :, y, x] = 0.0
    mu, var = (
        value.to(dtype).contiguous(memory_format=memory_format)
        for value, dtype in zip((mu, var), dtypes, strict=True)
    )
    counts = valid & (label >= 0) & (label < C)
    hidden = mu.masked_fill(~counts[:, None], torch.nan)
    got, inverse_norm = prototype_statistics(hidden, var, label, valid, C, with_norms=True)
    assert inverse_norm.dtype == (torch.float64 if dtypes[0] == torch.float64 else torch.float32)
    assert inverse_norm.shape == label.shape
    assert (inverse_norm[~counts] == 0).all()
    norm = torch.linalg.vector_norm(mu, dim=1, dtype=torch.float64).clamp(min=1e-12)
    assert (norm[counts] == 1e-12).sum() == 3
    torch.testing.assert_close(inverse_norm[counts].double(), 1 / norm[counts], rtol=1e-6, atol=0)
    without = prototype_statistics(hidden, var, label, valid, C)
    assert torch.equal(got.precision, without.precision)
    assert torch.equal(got.weighted_mean, without.weighted_mean)
    assert torch.equal(inverse_norm, prototype_statistics(hidden, var, label, valid, C, with_norms=True)[1])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_given_lists_give_the_same(memory_format: torch.memory_format) -> None:
    mu, var, label, valid = scene()
    mu, var = mu.contiguous(memory_format=memory_format), var.contiguous(memory_format=memory_format)
    expected, norms = prototype_statistics(mu, var, label, valid, C, with_norms=True)
    lists = lists_of(label, valid, label == 0, C)
    got, given_norms = prototype_statistics(mu, var, label, valid, C, lists=lists, with_norms=True)
    assert torch.equal(got.precision, expected.precision)
    assert torch.equal(got.weighted_mean, expected.weighted_mean)
    assert torch.equal(got.count, expected.count)
    assert torch.equal(given_norms, norms)
    with pytest.raises(ValueError, match=r"lists.valid_order must have shape"):
        prototype_statistics(mu[:1], var[:1], label[:1], valid[:1], C, lists=lists)


def test_uint8_labels_count_as_int64_ones() -> None:
    mu, var, label, valid = scene()
    label = label % 256
    expected = prototype_statistics(mu, var, label, valid, C)
    got = prototype_statistics(mu, var, label.to(torch.uint8), valid, C)
    assert torch.equal(got.precision, expected.precision)
    assert torch.equal(got.count, expected.count)


def test_result_carries_no_gradient() -> None:
    mu, var, label, valid = scene()
    got = prototype_statistics(mu.requires_grad_(), var.requires_grad_(), label, valid, C)
    assert not got.precision.requires_grad
    assert not got.mean.requires_grad


def test_wrong_arguments_are_named() -> None:
    mu, var, label, valid = scene()
    with pytest.raises(ValueError, match="var must have shape"):
        prototype_statistics(mu, var[:, :1], label, valid, C)
    for mu_dtype, var_dtype, allowed in (
        (torch.float32, torch.float64, "float32; got float64"),
        (torch.float32, torch.bfloat16, "float32; got bfloat16"),
        (torch.bfloat16, torch.float16, "bfloat16, float32; got float16"),
        (torch.float16, torch.float64, "float16, float32; got float64"),
    ):
        with pytest.raises(TypeError, match=f"var must be {allowed}"):
            prototype_statistics(mu.to(mu_dtype), var.to(var_dtype), label, valid, C)
    with pytest.raises(ValueError, match="label must have shape"):
        prototype_statistics(mu, var, label[:, 1:], valid, C)
    with pytest.raises(TypeError, match="valid must be bool"):
        prototype_statistics(mu, var, label, valid.long(), C)
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        prototype_statistics(mu, var, label, valid, 0)
    with pytest.raises(TypeError, match="mu must be a tensor"):
        prototype_statistics([1.0], var, label, valid, C)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mu must hold between 1 and"):
        prototype_statistics(mu[:0], var[:0], label[:0], valid[:0], C)


def test_opcheck_and_compile() -> None:
    mu, var, label, valid = scene()
    lists = lists_of(label, valid, valid, C)
    for order, start, with_norms in ((None, None, False), (lists.valid_order, lists.valid_start, True)):
        arguments = (mu.bfloat16(), var, label, valid, C, with_norms, order, start)
        torch.library.opcheck(torch.ops.prcl_fast.prototype_statistics.default, arguments)

    def mean_and_variance(*arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        statistics, inverse_norm = prototype_statistics(*arguments, C, with_norms=True)
        return statistics.mean, statistics.variance, inverse_norm

    compiled = torch.compile(mean_and_variance, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        compiled(mu, var, label, valid), mean_and_variance(mu, var, label, valid), strict=True
    ):
        torch.testing.assert_close(got, expected)
