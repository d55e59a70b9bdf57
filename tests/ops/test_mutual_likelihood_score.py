"""The mutual likelihood score through every backend, against float64 and the recorded published code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize as l2_normalize

from prcl_fast.ops import mutual_likelihood_score, use_backend
from prcl_fast.reference import mutual_likelihood_score as reference
from support import backends
from support.paths import GOLDEN

everywhere = backends.everywhere("mutual_likelihood_score")


def draw(batch: tuple[int, ...], m: int, n: int, d: int, **options: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(m * 1000 + n * 10 + d)
    sizes = [(*batch, m, d), (*batch, m, d), (*batch, n, d), (*batch, n, d)]
    values = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    values[1], values[3] = (value.sigmoid() * 0.99 + 0.01 for value in values[1::2])
    return [value.to(**options) for value in values]


def exact(
    operands: list[Tensor], grad: Tensor, reduction: str, normalize: bool
) -> tuple[Tensor, list[Tensor]]:
    """Score and gradients in float64 by autograd through the reference, on the CPU."""
    values = [value.detach().cpu().double().requires_grad_() for value in operands]
    mu_a, var_a, mu_b, var_b = values
    if normalize:
        mu_a, mu_b = l2_normalize(mu_a, dim=-1), l2_normalize(mu_b, dim=-1)
    score = reference.mutual_likelihood_score(mu_a, var_a, mu_b, var_b, reduction == "mean")
    return score.detach(), list(torch.autograd.grad(score, values, grad.cpu().double()))


def error(value: Tensor, expected: Tensor) -> float:
    """Relative L2; absolute where the expected vector is itself only rounding."""
    difference = (value.detach().cpu().double() - expected).norm()
    return (difference / expected.norm().clamp_min(1e-3)).item()


def run(operands: list[Tensor], grad: Tensor, backend: str, **options: Any) -> tuple[Tensor, list[Tensor]]:
    leaves = [value.detach().requires_grad_() for value in operands]
    with backends.on_backend(backend):
        score = mutual_likelihood_score(*leaves, **options)
        return score, list(torch.autograd.grad(score, leaves, grad))


@pytest.mark.parametrize("case", [0, 1, 2])
@everywhere
def test_equals_the_published_code(device: str, backend: str, case: int) -> None:
    with np.load(GOLDEN) as file:
        names = ("mu0", "s0", "mu1", "s1", "out")
        *operands, expected = (torch.from_numpy(file[f"mls{case}_{name}"]).float() for name in names)
    with backends.on_backend(backend):
        score = mutual_likelihood_score(
            *(value.to(device) for value in operands), reduction="mean", normalize=True
        )
    torch.testing.assert_close(score.cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    ("batch", "m", "n", "d"),
    [
        ((), 1, 1, 3),
        ((), 5, 37, 7),
        ((2,), 17, 9, 33),
        ((2, 1, 2), 4, 5, 16),
        ((), 70, 65, 19),
        ((), 3, 18, 257),
    ],
)
@everywhere
def test_score_and_all_gradients_agree_with_float64(
    device: str, backend: str, batch: tuple[int, ...], m: int, n: int, d: int, reduction: str, normalize: bool
) -> None:
    operands = draw(batch, m, n, d, dtype=torch.float32, device=device)
    grad = torch.randn(*batch, m, n, generator=torch.Generator().manual_seed(0)).to(device)
    expected, expected_grads = exact(operands, grad, reduction, normalize)
    score, grads = run(operands, grad, backend, reduction=reduction, normalize=normalize)
    assert score.dtype == torch.float32
    assert score.shape == (*batch, m, n)
    assert error(score, expected) < 2e-6  # Q and log cancel in part; the sums themselves are good to 2e-7
    for value, want in zip(grads, expected_grads, strict=True):
        assert error(value, want) < 1e-5


@everywhere
def test_float64_stays_float64(device: str, backend: str) -> None:
    operands = draw((2,), 19, 33, 41, dtype=torch.float64, device=device)
    grad = torch.ones(2, 19, 33, dtype=torch.float64, device=device)
    expected, expected_grads = exact(operands, grad, "sum", True)
    score, grads = run(operands, grad, backend, normalize=True)
    assert score.dtype == torch.float64
    for value, want in zip([score, *grads], [expected, *expected_grads], strict=True):
        assert error(value, want) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@everywhere
def test_half_precision_is_accumulated_in_float32(device: str, backend: str, dtype: torch.dtype) -> None:
    operands = draw((), 9, 21, 130, dtype=dtype, device=device)
    grad = torch.ones(9, 21, device=device)
    expected, expected_grads = exact(operands, grad, "sum", False)  # of the rounded inputs
    score, grads = run(operands, grad, backend)
    assert score.dtype == torch.float32
    assert error(score, expected) < 2e-6
    for value, want in zip(grads, expected_grads, strict=True):
        assert value.dtype == dtype
        assert error(value, want) < torch.finfo(dtype).eps  # only the cast back to the input's dtype rounds


@everywhere
def test_memory_layout_does_not_matter(device: str, backend: str) -> None:
    operands = draw((2,), 6, 11, 10, dtype=torch.float32, device=device)
    strided = [value.transpose(-1, -2).contiguous().transpose(-1, -2) for value in operands]
    grad = torch.randn(2, 11, 6, device=device).transpose(-1, -2)
    first = run(operands, grad.contiguous(), backend)
    second = run(strided, grad, backend)
    for value, same in zip([first[0], *first[1]], [second[0], *second[1]], strict=True):
        torch.testing.assert_close(value, same, rtol=1e-5, atol=1e-5)  # sums may run in another order


@pytest.mark.parametrize("wanted", [(0,), (1,), (3,), (0, 2)])
@everywhere
def test_gradients_go_only_where_they_are_asked_for(
    device: str, backend: str, wanted: tuple[int, ...]
) -> None:
    operands = draw((), 5, 8, 12, dtype=torch.float32, device=device)
    grad = torch.ones(5, 8, device=device)
    _, complete = run(operands, grad, backend)
    leaves = [value.requires_grad_(index in wanted) for index, value in enumerate(operands)]
    with backends.on_backend(backend):
        mutual_likelihood_score(*leaves).backward(grad)
    for index, leaf in enumerate(leaves):
        if index in wanted:
            torch.testing.assert_close(leaf.grad, complete[index])
        else:
            assert leaf.grad is None


@everywhere
def test_sums_below_the_clamp_count_as_1e_12_and_pass_no_gradient_to_variances(
    device: str, backend: str
) -> None:
    mu_a, var_a, mu_b, var_b = draw((), 3, 4, 9, dtype=torch.float32, device=device)
    var_a[0] = 0.0
    var_b[1, :5] = 0.0  # pair (0, 1) is clamped in five of nine dimensions
    mu_a[0] = 0.0
    mu_b[1] *= 1e-6  # near enough for a score of ordinary size
    operands = [mu_a, var_a, mu_b, var_b]
    grad = torch.zeros(3, 4, device=device)
    grad[0, 1] = 1.0
    expected, expected_grads = exact(operands, grad, "sum", False)
    score, grads = run(operands, grad, backend)
    assert error(score, expected) < 2e-6
    for value, want in zip(grads, expected_grads, strict=True):
        assert error(value, want) < 1e-5
    assert grads[1][0, :5].eq(0).all()
    assert grads[1][0, 5:].ne(0).all()
    assert grads[0][0, :5].ne(0).all()


@everywhere
def test_an_infinite_variance_gives_minus_infinity_and_no_gradient(device: str, backend: str) -> None:
    operands = draw((), 4, 6, 5, dtype=torch.float32, device=device)
    operands[3][2] = float("inf")  # as an absent class's prototype has, with mean zero
    operands[2][2] = 0.0
    expected, _ = exact(operands, torch.ones(4, 6), "sum", False)
    score, grads = run(operands, torch.ones(4, 6, device=device), backend)
    assert score[:, 2].eq(-float("inf")).all()
    kept = [0, 1, 3, 4, 5]
    assert error(score[:, kept], expected[:, kept]) < 2e-6
    assert all(value.isfinite().all() for value in grads)
    assert grads[2][2].abs().max() < 1e-15


@everywhere
def test_small_and_large_variances_keep_their_logarithm(device: str, backend: str) -> None:
    mu = torch.zeros(1, 64, device=device)
    for variance in (1e-11, 1e-6, 1e6, 1e17):
        var = torch.full((1, 64), variance, device=device)
        with backends.on_backend(backend):
            score = mutual_likelihood_score(mu, var, mu, var, reduction="mean")
        expected = -0.5 * np.log(2 * np.float32(variance).astype(np.float64))
        assert score.item() == pytest.approx(expected, rel=1e-6)


@everywhere
def test_a_variance_that_is_nan_makes_its_scores_and_gradients_nan(device: str, backend: str) -> None:
    operands = draw((), 5, 4, 6, dtype=torch.float32, device=device)
    operands[1][2, 3] = torch.nan
    score, grads = run(operands, torch.ones(5, 4, device=device), backend)
    assert score[2].isnan().all()
    assert not score[[0, 1, 3, 4]].isnan().any()
    assert grads[0][2, 3].isnan()
    assert grads[1][2, 3].isnan()


def test_more_programs_than_a_grid_holds_are_refused() -> None:
    pytest.importorskip("triton")
    from prcl_fast.kernels.launch import grid_of

    assert grid_of(1 << 20, 65535, 1) == (1 << 20, 65535, 1)
    with pytest.raises(ValueError, match="too large for one Triton launch: 1 x 65536 x 1 programs"):
        grid_of(1, 65536)


@everywhere
def test_empty_sets_are_allowed(device: str, backend: str) -> None:
    operands = draw((), 0, 4, 8, dtype=torch.float32, device=device)
    score, grads = run(operands, torch.empty(0, 4, device=device), backend)
    assert score.shape == (0, 4)
    assert grads[2].eq(0).all()
    assert grads[2].shape == (4, 8)


@everywhere
def test_the_same_call_gives_the_same_bits_for_any_number_of_threads(device: str, backend: str) -> None:
    backends.skip_on_one_thread(device, backend)
    operands = draw((2,), 67, 131, 7, dtype=torch.float32, device=device)
    grad = torch.randn(2, 67, 131, generator=torch.Generator().manual_seed(1)).to(device)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        score, grads = run(operands, grad, backend)
        results.append([score.detach(), *grads])
    torch.set_num_threads(threads)
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@everywhere
def test_opcheck(device: str, backend: str) -> None:
    operands = draw((2,), 3, 5, 6, dtype=torch.float32, device=device)
    grad = torch.randn(2, 3, 5, device=device)
    ops = torch.ops.prcl_fast
    with backends.on_backend(backend):
        leaves = [value.requires_grad_() for value in operands]
        torch.library.opcheck(ops.mutual_likelihood_score.default, (*leaves, True))
        constants = [value.detach() for value in operands]
        for need_a, need_b in ((True, True), (False, True)):
            arguments = (grad, *constants, False, need_a, need_b)
            torch.library.opcheck(ops.mutual_likelihood_score_backward.default, arguments)


@everywhere
def test_compiles_into_one_graph(device: str, backend: str) -> None:
    def loss(*operands: Tensor) -> Tensor:
        return mutual_likelihood_score(*operands, reduction="mean", normalize=True).logsumexp(-1).sum()

    operands = draw((2,), 3, 5, 6, dtype=torch.float32, device=device)
    eager = [value.clone().requires_grad_() for value in operands]
    compiled = [value.clone().requires_grad_() for value in operands]
    with backends.on_backend(backend):
        loss(*eager).backward()
        torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for first, second in zip(eager, compiled, strict=True):
        torch.testing.assert_close(first.grad, second.grad)


@pytest.mark.parametrize("normalize", [False, True])
def test_closed_form_gradients_pass_gradcheck(normalize: bool) -> None:
    operands = [value.requires_grad_() for value in draw((2,), 2, 3, 4, dtype=torch.float64)]
    with use_backend("torch"):
        assert torch.autograd.gradcheck(
            lambda *values: mutual_likelihood_score(*values, normalize=normalize), operands
        )


@pytest.mark.parametrize(
    ("index", "value", "kind", "name"),
    [
        (0, torch.zeros(4), ValueError, "mu_a"),
        (0, torch.zeros(2, 0), ValueError, "mu_a"),
        (0, torch.zeros(2, 4, dtype=torch.int64), TypeError, "mu_a"),
        (1, torch.zeros(3, 4), ValueError, "var_a"),
        (1, torch.zeros(2, 4, dtype=torch.bool), TypeError, "var_a"),
        (2, torch.zeros(3, 5), ValueError, "mu_b"),
        (2, torch.zeros(1, 3, 4), ValueError, "mu_b"),
        (3, torch.zeros(3, 1), ValueError, "var_b"),
        (3, torch.zeros(3, 4, device="meta"), ValueError, "var_b"),
        (3, [[1.0]], TypeError, "var_b"),
    ],
)
def test_a_wrong_argument_is_named(index: int, value: Any, kind: type[Exception], name: str) -> None:
    operands: list[Any] = draw((), 2, 3, 4, dtype=torch.float32)
    operands[index] = value
    with pytest.raises(kind, match=f"^{name} "):
        mutual_likelihood_score(*operands)


def test_an_unknown_reduction_is_named() -> None:
    with pytest.raises(ValueError, match="reduction must be sum or mean"):
        mutual_likelihood_score(*draw((), 1, 1, 1), reduction="max")
