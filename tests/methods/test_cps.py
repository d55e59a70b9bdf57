"""CPS against a plain transcription: each network learns from the other's labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from prcl_fast.config import parse_config
from prcl_fast.data.batches import Batch
from prcl_fast.methods import CPS, StepIndex, build_method
from support.stub_networks import IGNORE, PixelNetwork, cross_entropy, cut_mixed, small_batch, upsampled
from support.tiny import tiny_tree

C = 3
STEP = StepIndex(torch.tensor(0), 10)


@pytest.fixture(params=["cutmix", "none"])
def cps(request: pytest.FixtureRequest) -> CPS:
    torch.manual_seed(0)
    tree = tiny_tree(Path("unused"), name="cps", mix=request.param, lambda_cps=0.7)
    method = build_method(parse_config(tree, "tiny"), C)
    assert isinstance(method, CPS)
    method.student, method.second = PixelNetwork(C), PixelNetwork(C)  # type: ignore[assignment]
    return method.double()


def said(logits: Tensor, known: Tensor) -> Tensor:
    """The class of the largest logit at each pixel, IGNORE where `known` is False."""
    return upsampled(logits).argmax(1).masked_fill(~known, IGNORE)


def plain_losses(cps: CPS, batch: Batch) -> tuple[Tensor, Tensor]:
    """L_s and L_cps as in the paper."""
    networks = (cps.student, cps.second)
    labeled = [network(cps.normalize(batch.labeled_image)).logits for network in networks]
    weak = [network(cps.normalize(batch.unlabeled.image)).logits for network in networks]
    supervised = cross_entropy(labeled[0], batch.label) + cross_entropy(labeled[1], batch.label)
    labels = [said(logits, batch.unlabeled.inside) for logits in weak]
    if cps.settings.mix == "cutmix":
        labels = [cut_mixed(label, batch.unlabeled.strong) for label in labels]
        image = cut_mixed(batch.unlabeled.image, batch.unlabeled.strong)
        mixed = [network(cps.normalize(image)).logits for network in networks]
        return supervised, cross_entropy(mixed[0], labels[1]) + cross_entropy(mixed[1], labels[0])
    cross = cross_entropy(weak[0], labels[1]) + cross_entropy(weak[1], labels[0])
    labels = [said(logits, batch.label != IGNORE) for logits in labeled]
    return supervised, cross + cross_entropy(labeled[0], labels[1]) + cross_entropy(labeled[1], labels[0])


def test_each_network_learns_the_others_labels_and_labels_carry_no_gradient(cps: CPS) -> None:
    batch = small_batch(C)
    losses = cps.losses(batch, STEP)
    supervised, cross = plain_losses(cps, batch)
    torch.testing.assert_close(losses["loss_supervised"], supervised)
    torch.testing.assert_close(losses["loss_cross"], cross)
    torch.testing.assert_close(losses["loss"], supervised + 0.7 * cross)
    parameters = [*cps.student.parameters(), *cps.second.parameters()]
    expected = torch.autograd.grad(supervised + 0.7 * cross, parameters)
    for got, want in zip(torch.autograd.grad(losses["loss"], parameters), expected, strict=True):
        torch.testing.assert_close(got, want)
    assert all(gradient.any() for gradient in expected)


def test_labels_of_mixed_images_come_from_the_images_as_they_are_in_training_mode(cps: CPS) -> None:
    cps.train()
    cps.losses(small_batch(C), STEP)
    # (training mode, with a graph) of each pass: unlabeled images, then all; without mixing, one pass.
    expected = [(True, False), (True, True)] if cps.settings.mix == "cutmix" else [(True, True)]
    assert cps.student.calls == cps.second.calls == expected


def test_a_batch_of_ignored_pixels_gives_a_zero_that_stays_in_the_graph(cps: CPS) -> None:
    batch = small_batch(C)
    batch.label.fill_(IGNORE)
    batch.unlabeled.inside.fill_(False)
    losses = cps.losses(batch, STEP)
    losses["loss"].backward()
    assert losses["loss"] == losses["loss_cross"] == 0
    for network in cps.learners():
        assert network.embed.weight.grad is not None
        assert not network.embed.weight.grad.any()
