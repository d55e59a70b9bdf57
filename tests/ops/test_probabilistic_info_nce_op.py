"""The InfoNCE as an op: wrong arguments, opcheck, torch.compile, and paths of one backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prcl_fast.chunked import probabilistic_info_nce as chunked
from prcl_fast.ops import PrototypeStatistics, probabilistic_info_nce
from prcl_fast.reference import probabilistic_info_nce as reference
from support.backends import run_everywhere
from support.info_nce_scene import A, B, C, D, H, N, V, W, scene

place = run_everywhere("probabilistic_info_nce")


def test_chunks_agree_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
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
        case["virtual_mu"].index_fill(0, torch.tensor(1), torch.nan),
        0.1 + case["virtual_mu"].square().index_fill(0, torch.tensor(1), torch.nan),
        torch.tensor([True, False, True, True, True]),
        torch.tensor([0.5, 2.0, 1.0, 0.0, 1.0]),
        None,
        1.0,
        False,
        True,
        True,
    )
    expected = reference.probabilistic_info_nce(*arguments)
    at_hand = chunked.probabilistic_info_nce(*arguments)
    monkeypatch.setitem(chunked._CHUNK_BYTES, "cpu", 3 * N * D * 8)
    monkeypatch.setattr(chunked, "_is_readable_on_host", lambda device: False)
    for results in (at_hand, chunked.probabilistic_info_nce(*arguments)):
        for got, want in zip(results, expected, strict=True):
            assert torch.isfinite(got).all()
            torch.testing.assert_close(got, want.detach())


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


def test_more_pixels_than_an_index_can_name_are_refused() -> None:
    case = scene(torch.float32)
    huge = torch.zeros(1).expand(2, D, 1 << 15, 1 << 15)
    with pytest.raises(ValueError, match=r"mu must hold between 1 and 2\^31 - 1 pixels; got 2147483648"):
        probabilistic_info_nce(**{**case, "mu": huge, "var": huge}, tau=1.0)


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
        ("virtual_var", case["virtual_mu"][:, 1:], ValueError, r"virtual_var must have shape \[5, 3, 6\]"),
        ("virtual_var", torch.ones(C, V, D).int(), TypeError, "virtual_var must be float32"),
        ("virtual_known", torch.ones(C), TypeError, "virtual_known must be bool; got float32"),
        ("virtual_known", torch.ones(C + 1).bool(), ValueError, r"virtual_known must have shape \[5\]"),
        ("virtual_known", torch.ones(C, device="meta").bool(), ValueError, "virtual_known is on meta"),
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


@pytest.mark.parametrize("virtual", ["distributions", "points", None])
def test_opcheck(virtual: str | None) -> None:
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
            torch.rand(C, V, D) if virtual == "distributions" else None,
            torch.tensor([True, False, True, True, True]) if virtual else None,
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
            mu * 1.0,
            var,
            *indices,
            positive,
            case["virtual_mu"],
            virtual_var=case["virtual_mu"].square(),
            virtual_known=positive.count != 3,
            tau=1.0,
            reduction="mean",
            normalize=True,
        )

    expected = run(case["mu"], case["var"])
    expected_grads = torch.autograd.grad(expected, (case["mu"], case["var"]))
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(case["mu"], case["var"])
    torch.testing.assert_close(got, expected)
    for grad, want in zip(torch.autograd.grad(got, (case["mu"], case["var"])), expected_grads, strict=True):
        torch.testing.assert_close(grad, want)
