"""The contrast's InfoNCE: value, gradients at the anchors, and what is left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import run_everywhere
from torch import Tensor
from torch.nn import functional as F

from prcl_fast.ops import PrototypeStatistics, probabilistic_info_nce, use_backend
from prcl_fast.reference import probabilistic_info_nce as reference

place = run_everywhere("probabilistic_info_nce")
unwrapped = probabilistic_info_nce


def in_float64(mu: Tensor, var: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and gradients to mu and var by the reference, on the CPU, wherever the test runs."""
    exact = [x.detach().double().requires_grad_() for x in (mu, var)]
    with use_backend("torch"):
        loss = unwrapped(*exact, *arguments, **options)
        return loss.detach(), torch.autograd.grad(loss, exact)


B, D, H, W = 2, 6, 5, 4
C, A, N, V = 5, 7, 9, 3


def scene(dtype: torch.dtype = torch.float64, var_dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Class 2 is present without anchors, class 4 absent; some negatives are missing; anchors repeat."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    anchor_index = torch.randint(0, B * H * W, (C, A), generator=generator)
    anchor_index[0, 1] = anchor_index[0, 0]
    anchor_index[1, 0] = anchor_index[0, 0]
    anchor_index[[2, 4]] = -1
    negative_index = torch.randint(0, B * H * W, (C, A, N), generator=generator)
    negative_index[torch.rand(C, A, N, generator=generator) < 0.2] = -1
    negative_index[3, 2] = -1
    precision = (1 / (0.05 + draw(C, D))).index_fill(0, torch.tensor(4), 0)
    return {
        "mu": (4 * draw(B, D, H, W) - 2).to(dtype).requires_grad_(),
        "var": (0.02 + draw(B, D, H, W)).to(var_dtype or dtype).requires_grad_(),
        "anchor_index": anchor_index,
        "negative_index": negative_index,
        "positive": PrototypeStatistics(
            precision, precision * (2 * draw(C, D) - 1), torch.tensor([3, 5, 2, 9, 0])
        ),
        "virtual_mu": 2 * draw(C, V, D) - 1,
    }


def by_hand(scene: dict[str, Any], *, tau: float, reduction: str, normalize: bool) -> Tensor:
    """Eq. (15) an anchor and a pair at a time, differentiable, the others constants."""
    rows = scene["mu"].movedim(1, -1).reshape(-1, D)
    variances = scene["var"].movedim(1, -1).reshape(-1, D)
    positive, virtual = scene["positive"], scene["virtual_mu"]
    present = [c for c in range(C) if positive.count[c] > 0]

    def score(mu_i: Tensor, s_i: Tensor, mu_j: Tensor, s_j: Tensor) -> Tensor:
        if normalize:
            mu_i, mu_j = F.normalize(mu_i, dim=-1), F.normalize(mu_j, dim=-1)
        terms = (mu_i - mu_j) ** 2 / (s_i + s_j) + torch.log(s_i + s_j)
        return -0.5 * (terms.mean() if reduction == "mean" else terms.sum())

    total = rows.sum() * 0
    for c in present:
        losses = []
        for a in range(A):
            i = scene["anchor_index"][c, a]
            if i < 0:
                continue
            anchor = rows[i], variances[i]
            scores = [score(*anchor, positive.mean[c], positive.variance[c])]
            for j in scene["negative_index"][c, a]:
                if j >= 0:
                    scores.append(score(*anchor, rows[j].detach(), variances[j].detach()))
            for k in present:
                if virtual is not None and k != c:
                    scores += [score(*anchor, v, torch.zeros(D, dtype=v.dtype)) for v in virtual[k]]
            losses.append(-torch.log_softmax(torch.stack(scores) / tau, 0)[0])
        if losses:
            total = total + torch.stack(losses).mean()
    return total / len(present)


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
    loss = probabilistic_info_nce(**case, **options)
    grads = torch.autograd.grad(3 * loss, (case["mu"], case["var"]))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for got, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, 3 * want, rtol=1e-10, atol=1e-13)


CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


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
    # They are what is multiplied with: a wrong one shows.
    assert probabilistic_info_nce(**case, **options, inverse_norm=2 * given) != results[0][0]
    plain = probabilistic_info_nce(**case, **{**options, "normalize": False})
    assert torch.equal(
        probabilistic_info_nce(**case, **{**options, "normalize": False}, inverse_norm=given), plain
    )


def test_gradcheck() -> None:
    """Anchors in the first image, negatives, which are constants, in the second."""
    case = scene()
    pixels = H * W
    index = case["anchor_index"]
    case["anchor_index"] = torch.where(index >= 0, index % 3, -1)
    case["negative_index"] = torch.where(
        case["negative_index"] >= 0, case["negative_index"] % pixels + pixels, -1
    )
    mu, var = case.pop("mu").detach(), case.pop("var").detach()

    def loss(mu_anchors: Tensor, var_anchors: Tensor) -> Tensor:
        parts = [
            torch.cat([anchors, rest.flatten(2)[:1, :, 3:]], dim=2).reshape(1, D, H, W)
            for anchors, rest in ((mu_anchors, mu), (var_anchors, var))
        ]
        whole = (torch.cat([parts[0], mu[1:]]), torch.cat([parts[1], var[1:]]))
        return probabilistic_info_nce(*whole, **case, tau=0.7, reduction="mean", normalize=True)

    anchors = [x.flatten(2)[:1, :, :3].clone().requires_grad_() for x in (mu, var)]
    assert torch.autograd.gradcheck(loss, anchors)


def test_only_anchors_get_a_gradient() -> None:
    case = scene(torch.float32)
    probabilistic_info_nce(**case, tau=1.0).backward()
    index = case["anchor_index"]
    touched = torch.zeros(B * H * W, dtype=torch.bool).index_fill(0, index[index >= 0], True)
    for name in ("mu", "var"):
        moved = case[name].grad.movedim(1, -1).reshape(-1, D).abs().sum(1) > 0
        assert torch.equal(moved, touched)


def test_gradient_to_variance_is_zero_where_the_sum_is_clamped() -> None:
    case = scene(torch.float32)
    var = case["var"].detach().clone()
    i = case["anchor_index"][0, 0]
    b, y, x = int(i) // (H * W), int(i) % (H * W) // W, int(i) % W
    var[b, 0, y, x] = 0.0
    # All candidates of the anchor have variance 0 in that dimension too.
    case["anchor_index"] = torch.full((C, A), -1)
    case["anchor_index"][0, 0] = i
    case["negative_index"] = torch.full((C, A, N), -1)
    case["positive"].precision[0, 0] = 1e30
    case["var"] = var.requires_grad_()
    loss = probabilistic_info_nce(**case, tau=1e12)
    loss.backward()
    assert torch.isfinite(loss)
    assert case["var"].grad[b, 0, y, x] == 0
    assert (case["var"].grad[b, 1:, y, x] != 0).all()


@pytest.mark.parametrize("count", [[0, 0, 0, 0, 0], [0, 4, 0, 0, 0]])
def test_fewer_than_two_classes_give_a_zero_that_stays_in_the_graph(count: list[int]) -> None:
    case = scene(torch.float32)
    positive = case["positive"]
    case["positive"] = PrototypeStatistics(positive.precision, positive.weighted_mean, torch.tensor(count))
    loss = probabilistic_info_nce(**case, tau=1.0)
    loss.backward()
    assert loss == 0
    assert (case["mu"].grad == 0).all()
    assert (case["var"].grad == 0).all()


def test_no_anchor_gives_a_zero_that_stays_in_the_graph() -> None:
    case = scene(torch.float32)
    case["anchor_index"] = torch.full((C, A), -1)
    loss = probabilistic_info_nce(**case, tau=1.0)
    loss.backward()
    assert loss == 0
    assert (case["mu"].grad == 0).all()


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


def test_path_that_cannot_look_at_values_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks, and empty anchors computed and masked: absent classes and NaN features must not leak."""
    case = scene()
    with torch.no_grad():
        case["mu"][0, :, 0, 0] = torch.nan
    case["anchor_index"].masked_fill_(case["anchor_index"] == 0, 1)
    case["negative_index"].masked_fill_(case["negative_index"] == 0, 1)
    positive = case["positive"]
    arguments = (
        case["mu"].detach(),
        case["var"].detach(),
        case["anchor_index"],
        case["negative_index"],
        positive.mean,
        positive.variance,
        positive.count,
        case["virtual_mu"],
        torch.tensor([0.5, 2.0, 1.0, 0.0, 1.0]),
        None,
        1.0,
        False,
        True,
        True,
    )
    expected = reference.probabilistic_info_nce(*arguments)
    monkeypatch.setitem(reference._CHUNK_BYTES, "cpu", 3 * N * D * 8)
    monkeypatch.setattr(reference, "_values_are_at_hand", lambda device: False)
    for got, want in zip(reference.probabilistic_info_nce(*arguments), expected, strict=True):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got, want)


def test_the_tiles_of_a_gpu_give_the_same(place: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has larger tiles, because it takes its time by the operation."""
    if place != ("cpu", "triton"):
        pytest.skip("only interpreted kernels have tiles of their own")
    from prcl_fast.kernels import probabilistic_info_nce as kernels

    results = []
    for rows in (kernels._ROWS, 4):
        monkeypatch.setattr(kernels, "_ROWS", rows)
        case = scene(torch.float32)
        loss = probabilistic_info_nce(**case, tau=1.0)
        results.append((loss, *torch.autograd.grad(loss, (case["mu"], case["var"]))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's own maximum
@pytest.mark.parametrize("index", ["anchor_index", "negative_index"])
def test_a_variance_that_is_nan_makes_the_loss_nan(index: str) -> None:
    """Whoever watches for what is not finite has to see it: no lower bound may stand in for it."""
    case = scene(torch.float32)
    image, place = divmod(int(case[index].max()), case["var"][0, 0].numel())
    with torch.no_grad():
        case["var"].flatten(2)[image, :, place] = torch.nan
    assert probabilistic_info_nce(**case, tau=1.0).isnan()


def test_repeated_anchors_add_up_the_same_way_every_time() -> None:
    case = scene(torch.float32)
    case["anchor_index"][0] = case["anchor_index"][0, 0]
    grads = []
    for _ in range(3):
        mu = case["mu"].detach().clone().requires_grad_()
        probabilistic_info_nce(**{**case, "mu": mu}, tau=1.0).backward()
        grads.append(mu.grad)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_the_graph_may_be_used_twice_and_by_one_input_alone() -> None:
    case = scene(torch.float32)
    loss = probabilistic_info_nce(**case, tau=1.0)
    loss.backward(retain_graph=True)
    once = case["mu"].grad.clone(), case["var"].grad.clone()
    (-3.0 * loss).backward()
    for name, grad in zip(("mu", "var"), once, strict=True):
        torch.testing.assert_close(case[name].grad, -2.0 * grad)
    for name, grad in zip(("mu", "var"), once, strict=True):
        alone = {**case, "mu": case["mu"].detach(), "var": case["var"].detach()}
        alone[name].requires_grad_()
        probabilistic_info_nce(**alone, tau=1.0).backward()
        assert torch.equal(alone[name].grad, grad)


def test_a_second_derivative_is_refused() -> None:
    case = scene(torch.float32)
    (grad,) = torch.autograd.grad(probabilistic_info_nce(**case, tau=1.0), case["mu"], create_graph=True)
    with pytest.raises(RuntimeError):
        grad.square().sum().backward()


def test_more_pixels_than_an_index_can_name_are_refused() -> None:
    case = scene(torch.float32)
    huge = torch.zeros(1).expand(2, D, 1 << 15, 1 << 15)
    with pytest.raises(ValueError, match=r"mu must hold between 1 and 2\^31 - 1 pixels; got 2147483648"):
        probabilistic_info_nce(**{**case, "mu": huge, "var": huge}, tau=1.0)


def test_autocast_does_not_change_the_result() -> None:
    case = scene(torch.float32)
    expected = probabilistic_info_nce(**case, tau=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = probabilistic_info_nce(**case, tau=1.0)
    assert torch.equal(got, expected)


def test_no_gradient_is_made_where_none_is_asked_for() -> None:
    case = scene(torch.float32)
    with torch.no_grad():
        loss = probabilistic_info_nce(**case, tau=1.0)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, probabilistic_info_nce(**case, tau=1.0).detach())


def test_wrong_arguments_are_named() -> None:
    case = scene()
    with pytest.raises(ValueError, match="tau must be positive"):
        probabilistic_info_nce(**case, tau=0.0)
    with pytest.raises(ValueError, match="reduction must be sum or mean"):
        probabilistic_info_nce(**case, tau=1.0, reduction="none")
    for name, value, error, match in (
        ("negative_index", case["negative_index"][1:], ValueError, "negative_index must have shape"),
        (
            "negative_index",
            case["negative_index"][:, 1:],
            ValueError,
            "divide the 7 anchors of a class; got 6",
        ),
        (
            "negative_index",
            case["negative_index"][:, :0],
            ValueError,
            "divide the 7 anchors of a class; got 0",
        ),
        ("anchor_index", case["anchor_index"].int(), TypeError, "anchor_index must be int64"),
        ("virtual_mu", case["virtual_mu"][..., 1:], ValueError, "virtual_mu must have shape"),
        ("inverse_norm", torch.ones(B, H, W + 1).double(), ValueError, "inverse_norm must have shape"),
        ("inverse_norm", torch.ones(B, H, W), TypeError, "inverse_norm must be float64"),
        ("var", case["var"].float(), TypeError, "var must be float64; got float32"),
        (
            "positive",
            PrototypeStatistics(*[torch.zeros(2, D)] * 2, torch.zeros(2).long()),
            ValueError,
            "positive.prec",
        ),
    ):
        with pytest.raises(error, match=match):
            probabilistic_info_nce(**{**case, name: value}, tau=1.0)


@pytest.mark.parametrize("virtual", [True, False])
def test_opcheck(virtual: bool) -> None:
    case = scene(torch.float32)
    positive = case["positive"]
    torch.library.opcheck(
        torch.ops.prcl_fast.probabilistic_info_nce.default,
        (
            case["mu"],
            case["var"],
            case["anchor_index"],
            case["negative_index"],
            positive.mean,
            positive.variance,
            positive.count,
            case["virtual_mu"] if virtual else None,
            torch.rand(C) if virtual else None,
            torch.rand(B, H, W) if virtual else None,
            1.0,
            True,
            True,
            True,
        ),
    )


def test_opcheck_of_the_backward_op() -> None:
    arguments = (
        torch.tensor(2.0),
        torch.randn(C, A, D),
        torch.randn(C, A, D),
        scene()["anchor_index"],
        B,
        H,
        W,
    )
    op = torch.ops.prcl_fast.probabilistic_info_nce_backward.default
    torch.library.opcheck(op, (*arguments, torch.bfloat16, torch.float32, True, False))
    torch.library.opcheck(op, (*arguments, torch.float32, torch.float32, False, False))


def test_compiles_whole_with_its_backward_pass() -> None:
    case = scene(torch.float32)
    positive, indices = case["positive"], (case["anchor_index"], case["negative_index"])

    def run(mu: Tensor, var: Tensor) -> Tensor:
        return probabilistic_info_nce(
            mu * 1.0, var, *indices, positive, case["virtual_mu"], tau=1.0, reduction="mean", normalize=True
        )

    expected = run(case["mu"], case["var"])
    expected_grads = torch.autograd.grad(expected, (case["mu"], case["var"]))
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(case["mu"], case["var"])
    torch.testing.assert_close(got, expected)
    for grad, want in zip(torch.autograd.grad(got, (case["mu"], case["var"])), expected_grads, strict=True):
        torch.testing.assert_close(grad, want)
