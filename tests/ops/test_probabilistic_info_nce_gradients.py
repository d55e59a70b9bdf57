"""The InfoNCE's gradients: the pixels that get one, zeros and nan, and the autograd graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prcl_fast.ops import PrototypeStatistics, probabilistic_info_nce
from support.backends import run_everywhere
from support.info_nce_scene import A, B, C, D, H, N, W, scene

place = run_everywhere("probabilistic_info_nce")


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


def test_without_a_class_present_there_is_a_zero_that_stays_in_the_graph() -> None:
    case = scene(torch.float32)
    positive = case["positive"]
    case["positive"] = PrototypeStatistics(
        positive.precision, positive.weighted_mean, torch.zeros(C, dtype=torch.int64)
    )
    loss = probabilistic_info_nce(**case, tau=1.0, virtual_known=torch.ones(C, dtype=torch.bool))
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


def test_no_gradient_is_made_where_none_is_asked_for() -> None:
    case = scene(torch.float32)
    with torch.no_grad():
        loss = probabilistic_info_nce(**case, tau=1.0)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, probabilistic_info_nce(**case, tau=1.0).detach())


def test_autocast_does_not_change_the_result() -> None:
    case = scene(torch.float32)
    expected = probabilistic_info_nce(**case, tau=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = probabilistic_info_nce(**case, tau=1.0)
    assert torch.equal(got, expected)
