"""Segmentation losses and schedules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prcl_fast.losses import lambda_c, poly_lr, supervised_loss, unsupervised_loss


def scene() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(3, 5, 4, 6, generator=generator)).requires_grad_()
    label = torch.randint(0, 5, (3, 13, 17), generator=generator)
    label[torch.rand(3, 13, 17, generator=generator) < 0.2] = 255
    return logits, label.to(torch.uint8), torch.rand(3, 13, 17, generator=generator)


def pixel_losses(logits: Tensor, label: Tensor) -> Tensor:
    full = F.interpolate(logits, label.shape[1:], mode="bilinear", align_corners=True)
    return F.cross_entropy(full, label.long(), ignore_index=255, reduction="none")


def test_supervised_loss_is_the_mean_over_labeled_pixels() -> None:
    logits, label, _ = scene()
    expected = pixel_losses(logits, label).sum() / (label != 255).sum()
    torch.testing.assert_close(supervised_loss(logits, label), expected, rtol=1e-5, atol=0)


def test_unsupervised_loss_is_weighed_by_the_batchs_share_of_confident_pixels() -> None:
    logits, label, confidence = scene()
    kept = label != 255
    omega = (confidence[kept] > 0.7).float().mean()
    expected = omega * pixel_losses(logits, label).sum() / kept.sum()
    torch.testing.assert_close(unsupervised_loss(logits, label, confidence, 0.7), expected, rtol=1e-5, atol=0)


def test_unsupervised_loss_weighs_each_image_by_its_own_share() -> None:
    logits, label, confidence = scene()
    confidence[0] = 0.0
    kept = label != 255
    weight = (confidence >= 0.7).sum((1, 2)) / kept.sum((1, 2))
    expected = (weight[:, None, None] * pixel_losses(logits, label)).sum() / kept.sum()
    loss = unsupervised_loss(logits, label, confidence, 0.7, omega="image")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    assert (logits.grad[0] == 0).all()
    assert (logits.grad[1] != 0).any()


def test_unsupervised_loss_takes_confident_pixels_whole_and_leaves_others_out() -> None:
    logits, label, confidence = scene()
    confidence[0, 0, 0], label[0, 0, 0] = 0.7, 1  # eq. (9) of PCR counts what is at the threshold
    kept = label != 255
    total, own = logits.new_zeros((), dtype=torch.float64), logits.double()
    full = F.interpolate(own, label.shape[1:], mode="bilinear", align_corners=True)
    for b, y, x in (kept & (confidence >= 0.7)).nonzero().tolist():
        total = total - full[b, :, y, x].log_softmax(0)[int(label[b, y, x])]
    expected = total / kept.sum()
    (wanted,) = torch.autograd.grad(expected, logits)
    loss = unsupervised_loss(logits, label, confidence, 0.7, omega="pixel")
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(logits.grad, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("omega", ["batch", "image", "pixel"])
def test_all_ignored_gives_a_zero_that_stays_in_the_graph(omega: str) -> None:
    logits, label, confidence = scene()
    loss = unsupervised_loss(logits, torch.full_like(label, 255), confidence, 0.7, omega=omega)
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_omega_is_one_where_all_pixels_are_confident_and_zero_where_none_is() -> None:
    logits, label, confidence = scene()
    certain = torch.ones_like(confidence)
    torch.testing.assert_close(
        unsupervised_loss(logits, label, certain, 0.97), supervised_loss(logits, label)
    )
    assert unsupervised_loss(logits, label, certain, 1.0) == 0


def test_wrong_arguments_are_named() -> None:
    logits, label, confidence = scene()
    with pytest.raises(ValueError, match="omega must be one of batch, image, pixel; got 'none'"):
        unsupervised_loss(logits, label, confidence, 0.7, omega="none")
    with pytest.raises(ValueError, match="confidence must have pseudo_label's shape"):
        unsupervised_loss(logits, label, confidence[:1], 0.7)


def test_lambda_c_falls_from_its_initial_value_to_exp_alpha_of_it() -> None:
    assert lambda_c(0.5, torch.tensor(0), 100) == 0.5
    assert lambda_c(0.5, torch.tensor(100), 100) == pytest.approx(0.5 * 0.006737946999085467)
    assert lambda_c(1.0, torch.tensor(50), 100, alpha=-4.0) == pytest.approx(0.36787944117144233)


def test_poly_lr_falls_to_its_floor_and_stays_there() -> None:
    assert poly_lr(0.1, torch.tensor(0), 10) == 0.1
    assert poly_lr(0.1, torch.tensor(5), 10, power=2.0) == pytest.approx(0.025)
    assert poly_lr(0.1, torch.tensor(10), 10) == 0.0
    assert poly_lr(0.1, torch.tensor(12), 10, floor=1e-6) == 1e-6
