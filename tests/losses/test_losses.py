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


def exact_losses(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """-log softmax at the label, [B, H, W] float64, 0 where ignored; and the mask of kept pixels."""
    full = F.interpolate(logits.double(), label.shape[1:], mode="bilinear", align_corners=True)
    kept = label != 255
    loss = -full.log_softmax(1).gather(1, label.long().where(kept, 0)[:, None])[:, 0]
    return loss * kept, kept


def assert_loss_and_gradient(omega: str, expected: Tensor, scene_: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, label, confidence = scene_
    (wanted,) = torch.autograd.grad(expected, logits)
    loss = unsupervised_loss(logits, label, confidence, 0.7, omega=omega)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(logits.grad, wanted, rtol=1e-4, atol=1e-7)


def test_omega_batch_is_equation_14_of_the_ijcv_paper() -> None:
    logits, label, confidence = scene()
    loss, kept = exact_losses(logits, label)
    omega = (kept & (confidence > 0.7)).sum().double() / kept.sum()  # N^ / N
    assert_loss_and_gradient("batch", omega * loss.sum() / kept.sum(), (logits, label, confidence))


def test_omega_pixel_is_equation_11_of_the_aaai_paper() -> None:
    logits, label, confidence = scene()
    loss, kept = exact_losses(logits, label)
    confident = kept & (confidence > 0.7)
    only = loss[confident].mean()  # "we only consider the pixels whose predicted confidence" is above delta_u
    lambda_u = confident.sum().double() / kept.sum()  # "the percentage of them"
    assert_loss_and_gradient("pixel", lambda_u * only, (logits, label, confidence))


def test_equation_11_of_the_aaai_paper_is_the_same_image_by_image() -> None:
    logits, label, confidence = scene()
    label[label == 255] = 0  # so that all images have as many pixels
    loss, _ = exact_losses(logits, label)
    confident = confidence > 0.7
    each = [confident[i].double().mean() * loss[i][confident[i]].mean() for i in range(len(loss))]
    assert_loss_and_gradient("pixel", torch.stack(each).mean(), (logits, label, confidence))


def test_omega_pixel_is_equation_9_of_pcr_at_the_threshold_too() -> None:
    logits, label, confidence = scene()
    confidence[0, 0, 0], label[0, 0, 0] = 0.7, 1
    loss, kept = exact_losses(logits, label)
    total = (loss * (confidence >= 0.7)).sum() / kept.sum()
    assert_loss_and_gradient("pixel", total, (logits, label, confidence))


def test_omega_image_is_the_public_code_of_the_aaai_papers_authors() -> None:
    logits, label, confidence = scene()
    confidence[0] = 0.0
    loss, kept = exact_losses(logits, label)
    weight = (confidence >= 0.7).sum((1, 2)).double() / kept.sum((1, 2))
    # The public code takes the mean over positive losses: here, over all pixels that are not ignored.
    assert (loss[kept] > 0).all()
    expected = (weight[:, None, None] * loss)[loss > 0].mean()
    assert_loss_and_gradient("image", expected, (logits, label, confidence))
    assert (logits.grad[0] == 0).all()
    assert (logits.grad[1] != 0).any()


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
    with pytest.raises(ValueError, match="confidence must have shape"):
        unsupervised_loss(logits, label, confidence[:1], 0.7)


def test_lambda_c_falls_from_its_initial_value_to_exp_alpha_of_it() -> None:
    assert lambda_c(0.5, torch.tensor(0), 100) == 0.5
    assert lambda_c(0.5, torch.tensor(100), 100) == pytest.approx(0.5 * 0.006737946999085467)
    assert lambda_c(1.0, torch.tensor(50), 100, alpha=-4.0) == pytest.approx(0.36787944117144233)


def test_poly_lr_falls_to_0_and_stays_there() -> None:
    assert poly_lr(0.1, torch.tensor(0), 10) == 0.1
    assert poly_lr(0.1, torch.tensor(5), 10, power=2.0) == pytest.approx(0.025)
    assert poly_lr(0.1, torch.tensor(10), 10) == 0.0
    assert poly_lr(0.1, torch.tensor(12), 10) == 0.0
