"""PCR against a plain transcription: both phases of the method, and its variants."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from prcl_fast.config import parse_config
from prcl_fast.engine import trainer as trainer_module
from prcl_fast.engine.graph import CapturedStep
from prcl_fast.engine.trainer import Trainer
from prcl_fast.methods import PCR, build_method
from prcl_fast.methods.pcr import prototype_features
from support.plain_pcr import C, D, K, draw, plain_scores, plain_update, step, with_stub
from support.stub_networks import IGNORE, cross_entropy, cut_mixed, small_batch, upsampled
from support.tiny import tiny_tree


def apart(pcr: PCR) -> None:
    """Moves the teacher away from the student, so that their labels differ."""
    with torch.no_grad():
        for parameter in pcr.teacher.network.parameters():
            parameter.add_(0.3 * draw(*parameter.shape, seed=7))


def test_the_warm_up_learns_from_labels_alone_and_keeps_their_features() -> None:
    pcr, batch = with_stub(), small_batch(C, torch.float32)
    assert pcr.begin_step(0)
    losses = pcr(batch, step(0))
    output = pcr.student(pcr.normalize(batch.labeled_image))
    torch.testing.assert_close(losses["loss"], cross_entropy(output.logits, batch.label))
    assert torch.equal(losses["loss"], losses["loss_supervised"])
    assert all(value == 0 for name, value in losses.items() if name not in ("loss", "loss_supervised"))
    label = batch.label[:, ::2, ::2]  # at the network's pixels
    for c in range(C):
        allowed = {tuple(row) for row in output.features.movedim(1, -1)[label == c].tolist()}
        kept = int(pcr.samples.count[c])
        assert kept == min(8, int((label == c).sum()))
        assert {tuple(row) for row in pcr.samples.features[c, :kept].tolist()} <= allowed


def test_both_predictors_learn_from_labels_and_from_confident_pseudo_labels() -> None:
    """Eq. (4)-(6), (8)-(11): both predictors, and pseudo-labels with p >= tau, one of them p = tau."""
    first, batch = with_stub(), small_batch(C, torch.float32)
    apart(first)
    pseudo = first.pseudo_labeled(batch)
    seen = pseudo.confidence[:, ::2, ::2][pseudo.label[:, ::2, ::2] != IGNORE]  # by the prototypes
    tau = float(seen.sort().values[len(seen) // 2])
    pcr = with_stub(delta_u=tau, lambda_prototype=0.7)
    apart(pcr)
    assert not pcr.begin_step(4)
    before = pcr.predictor.prototypes.clone()
    losses = pcr.losses(batch, step(4))

    unlabeled = pcr.pseudo_labeled(batch)
    # Eq. (7): the teacher's linear predictor labels the weakly augmented images.
    weak = pcr.teacher(pcr.normalize(batch.unlabeled.image)).logits
    label = upsampled(weak.double()).argmax(1).masked_fill(~batch.unlabeled.inside, IGNORE)
    assert torch.equal(unlabeled.label.long(), cut_mixed(label, batch.unlabeled.strong))
    certain = unlabeled.confidence >= tau
    assert 0.2 < certain.float().mean() < 0.8
    outputs = [pcr.student(image) for image in (pcr.normalize(batch.labeled_image), unlabeled.image)]
    expected = {}
    for name, scores in (
        ("loss_", [output.logits for output in outputs]),
        ("loss_prototype_", [plain_scores(output.features, before) for output in outputs]),
    ):
        expected[f"{name}supervised"] = cross_entropy(scores[0], batch.label)
        expected[f"{name}unsupervised"] = cross_entropy(scores[1], unlabeled.label, certain)
    linear, prototype = (
        expected[f"{name}supervised"] + expected[f"{name}unsupervised"]
        for name in ("loss_", "loss_prototype_")
    )
    expected["loss"] = linear + 0.7 * prototype
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-5)
    parameters = list(pcr.student.parameters())
    wanted = torch.autograd.grad(expected["loss"], parameters, allow_unused=True)
    for got, want in zip(torch.autograd.grad(losses["loss"], parameters), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    # The prototypes follow all labeled pixels and the confident unlabeled ones.
    features = torch.cat([output.features.detach() for output in outputs])
    label = torch.cat([batch.label, unlabeled.label])[:, ::2, ::2]
    valid = torch.cat([batch.label != IGNORE, certain])[:, ::2, ::2]
    updated, moved = plain_update(before, features, label, valid, (True,) * C)
    torch.testing.assert_close(pcr.predictor.prototypes.double(), updated, rtol=1e-5, atol=1e-6)
    assert moved


def test_prototypes_alone_label_the_unlabeled_images_and_learn_from_their_labels() -> None:
    """Table 4, variant 2: eq. (2) on the teacher's features in place of eq. (7), and no linear loss."""
    pcr, batch = with_stub(delta_u=0.5, predictor="prototype"), small_batch(C, torch.float32)
    pcr.begin_step(4)
    apart(pcr)
    before, unlabeled = pcr.predictor.prototypes.clone(), pcr.pseudo_labeled(batch)
    losses = pcr.losses(batch, step(4))
    weak = pcr.teacher(pcr.normalize(batch.unlabeled.image)).features
    probability = upsampled(plain_scores(weak.double(), before.double())).softmax(1)
    confidence, label = probability.max(1)
    label, confidence = (
        label.masked_fill(~batch.unlabeled.inside, IGNORE),
        confidence.masked_fill(~batch.unlabeled.inside, 0),
    )
    label, confidence = (
        cut_mixed(label, batch.unlabeled.strong),
        cut_mixed(confidence, batch.unlabeled.strong),
    )
    certain = confidence >= 0.5
    assert 0.2 < certain.float().mean() < 0.8
    assert torch.equal(unlabeled.label.long(), label)
    torch.testing.assert_close(unlabeled.confidence.double(), confidence, rtol=1e-4, atol=1e-5)
    images = (pcr.normalize(batch.labeled_image), unlabeled.image)
    scores = [plain_scores(pcr.student(image).features, before) for image in images]
    expected = {
        "loss_supervised": cross_entropy(scores[0], batch.label),
        "loss_unsupervised": cross_entropy(scores[1], label, certain),
    }
    expected["loss"] = expected["loss_supervised"] + expected["loss_unsupervised"]
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-5)
    losses["loss"].backward()
    assert pcr.student.classify.weight.grad is None
    assert not torch.equal(pcr.predictor.prototypes, before)


@pytest.mark.parametrize("predictor", ["both", "prototype"])
def test_the_prototype_predictor_is_evaluated_on_the_features_of_its_network(predictor: str) -> None:
    """Table 7, second row."""
    pcr, image = with_stub(predictor=predictor), small_batch(C, torch.float32).labeled_image
    networks = pcr.networks()
    assert next(iter(networks)) == "teacher"
    assert networks.keys() == {"teacher", "student"} | (
        {"teacher_prototypes"} if predictor == "both" else set()
    )
    own = {"teacher": pcr.teacher.network, "student": pcr.student, "teacher_prototypes": pcr.teacher.network}
    with torch.no_grad():
        pcr.teacher.network.embed.weight.mul_(-1)
        for name, network in networks.items():
            output = own[name](image)
            expected = output.logits
            if name == "teacher_prototypes" or predictor == "prototype":
                expected = plain_scores(output.features, pcr.predictor.prototypes)
            torch.testing.assert_close(network(image, representations=False).logits, expected)


def test_prototypes_are_of_what_the_classifier_reads_or_of_the_aspp() -> None:
    tree = tiny_tree(Path("unused"), name="pcr", warmup=2)
    for features in ("decoder", "aspp"):
        tree["method"]["features"] = features
        pcr = build_method(parse_config(tree, "tiny"), C)
        assert isinstance(pcr, PCR)
        pcr.eval()
        seen = {}
        pcr.student.decoder.aspp.register_forward_hook(lambda *args, seen=seen: seen.update(aspp=args[2]))
        pcr.student.classifier.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.update(decoder=args[0])
        )
        output = pcr.student(draw(1, 3, 32, 48))
        wanted = seen[features]
        if features == "aspp":
            wanted = upsampled(wanted, (8, 12))
        found = prototype_features(output, pcr.predictor)
        torch.testing.assert_close(found, wanted)
        assert found.shape[1] == pcr.predictor.prototypes.shape[2] == {"decoder": 32, "aspp": 16}[features]


def test_k_means_makes_the_prototypes_once_where_the_warm_up_ends() -> None:
    pcr = with_stub()
    pcr.predictor.initialize(torch.zeros(C, K, D), torch.zeros(C, dtype=torch.bool))
    centers = 10 * draw(C, K, D)
    for c in (0, 1):
        pcr.samples.features[c, :8] = centers[c].repeat(4, 1) + 0.01 * draw(8, D, seed=c)
        pcr.samples.count[c] = 8
    changed = []
    for iteration in range(4):
        changed.append(pcr.begin_step(iteration))
        assert pcr.predictor.known.tolist() == [iteration >= 2, iteration >= 2, False]
        if iteration == 2:
            made = pcr.predictor.prototypes.clone()
    assert changed == [True, False, True, False]
    for c in (0, 1):
        distance = torch.cdist(centers[c], made[c])
        assert distance.min(1).values.max() < 0.1
    assert not made[2].any()
    assert torch.equal(pcr.predictor.prototypes, made)


def test_a_run_that_goes_on_after_the_warm_up_keeps_its_prototypes() -> None:
    pcr = with_stub()
    before = pcr.predictor.prototypes.clone()
    assert not pcr.begin_step(3)
    assert torch.equal(pcr.predictor.prototypes, before)


def test_a_captured_step_is_forgotten_where_the_warm_up_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Captured:
        """Stand-in for a captured step: counts the steps since it was made or since `forget`."""

        def __init__(self, wrapped: Any) -> None:
            self.step, self.calls = wrapped, 0

        def __call__(self, batches: Any) -> dict[str, Tensor]:
            self.calls += 1
            return self.step(batches)

        def forget(self) -> None:
            self.calls = 0

    monkeypatch.setattr(trainer_module, "CapturedStep", Captured)
    tree = tiny_tree(tmp_path / "run", name="pcr", warmup=2)
    tree["data"]["crop"] = [32, 32]
    trainer = Trainer(parse_config(tree, "tiny"), Console(quiet=True))
    trainer._run_step = captured = Captured(trainer.train_step)  # type: ignore[assignment]
    calls = []
    with contextlib.closing(trainer.batches()) as batches:
        for _ in range(3):
            trainer.step(batches)
            calls.append((captured.calls, trainer._steps_here))
    assert calls == [(1, 1), (2, 2), (1, 1)]


def test_a_step_that_forgets_is_as_one_that_was_never_captured() -> None:
    captured = CapturedStep.__new__(CapturedStep)
    captured._graph, captured._calls = object(), 9  # type: ignore[assignment]
    captured.forget()
    assert captured._graph is None
    assert captured._calls == 0
