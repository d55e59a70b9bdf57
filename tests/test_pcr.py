"""PCR against a plain transcription: the prototype predictor, its K-means, and both phases of the method."""

from __future__ import annotations

import contextlib
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_tree
from rich.console import Console
from stub_networks import IGNORE, PixelNetwork, cross_entropy, small_batch
from torch import Tensor

from prcl_fast.config import parse_config
from prcl_fast.engine import trainer as trainer_module
from prcl_fast.engine.graph import CapturedStep
from prcl_fast.engine.trainer import Trainer
from prcl_fast.losses import FeatureBank, PrototypePredictor
from prcl_fast.methods import PCR, Step, build_method
from prcl_fast.methods.pcr import cluster_centers
from prcl_fast.models.teacher import EMATeacher

C, K, D, T = 3, 2, 4, 0.2


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def predictor(known: tuple[bool, ...] = (True, True, True), decay: float = 0.99) -> PrototypePredictor:
    made = PrototypePredictor(C, K, D, temperature=T, decay=decay)
    made.initialize(draw(C, K, D, seed=9) * torch.tensor(known)[:, None, None], torch.tensor(known))
    return made


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


# Eq. (2).


def plain_scores(features: Tensor, prototypes: Tensor) -> Tensor:
    """[B, D, h, w] -> [B, C, h, w]: the largest cosine with one of the class's prototypes, over T."""
    batch, _, height, width = features.shape
    rows = [
        max(cosine(features[b, :, y, x], p) for p in prototypes[c]) / T
        for b, c, y, x in product(range(batch), range(C), range(height), range(width))
    ]
    return torch.stack(rows).view(batch, C, height, width)


def test_scores_are_of_the_nearest_prototype_and_their_gradient_is_the_features() -> None:
    made, features = predictor(), draw(2, D, 3, 4).double().requires_grad_()
    scores, expected = made.double()(features), plain_scores(features, made.prototypes)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
    weight = draw(*scores.shape, seed=1).double()
    (expected.softmax(1) * weight).sum().backward()
    wanted, features.grad = features.grad, None
    (scores.double().softmax(1) * weight).sum().backward()
    torch.testing.assert_close(features.grad, wanted, rtol=1e-4, atol=1e-6)
    assert not made.prototypes.requires_grad
    assert not list(made.parameters())


def test_a_class_without_prototypes_has_the_lowest_score() -> None:
    scores = predictor((True, False, True))(draw(2, D, 3, 4))
    assert (scores[:, 1] == -1 / T).all()
    assert (scores[:, [0, 2]] > -1 / T).all()


def test_scores_under_autocast_are_float32() -> None:
    made, features = predictor(), draw(2, D, 3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = made(features.bfloat16())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, made(features), rtol=0, atol=0.03 / T)


# Eq. (11).


def plain_update(
    prototypes: Tensor, features: Tensor, label: Tensor, valid: Tensor, known: tuple[bool, ...]
) -> tuple[Tensor, set[tuple[int, int]]]:
    """The prototypes after the update, and which of them have pixels."""
    pixels: dict[tuple[int, int], list[Tensor]] = {}
    for b, y, x in product(*map(range, label.shape)):
        c, feature = int(label[b, y, x]), features[b, :, y, x].double()
        if valid[b, y, x] and c < C and known[c]:
            nearest = max(range(K), key=lambda k: float(cosine(feature, prototypes[c, k].double())))
            pixels.setdefault((c, nearest), []).append(feature)
    updated = prototypes.double().clone()
    for key, members in pixels.items():
        updated[key] = 0.99 * updated[key] + 0.01 * torch.stack(members).mean(0)
    return updated, set(pixels)


def labels(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.tensor([0, 1, 2, IGNORE, C])[torch.randint(0, 5, (2, 3, 4), generator=generator)]
    return label, torch.rand(2, 3, 4, generator=generator) < 0.7


def test_prototypes_move_to_the_mean_of_the_nearest_features_of_their_class() -> None:
    made, features, (label, valid) = predictor(), 5 * draw(2, D, 3, 4), labels()
    label[label == 0] = 1  # class 0 has no pixels
    features[:, :, 0] = torch.nan  # nor does it matter what those hold that do not count
    valid[:, 0] = False
    before = made.prototypes.clone()
    expected, moved = plain_update(before, features, label, valid, (True,) * C)
    made.update(features, label.to(torch.uint8), valid)
    torch.testing.assert_close(made.prototypes.double(), expected, rtol=1e-6, atol=1e-6)
    assert {
        key for key in product(range(C), range(K)) if not torch.equal(made.prototypes[key], before[key])
    } == moved
    assert 2 <= len(moved) <= 2 * K


def test_a_class_without_prototypes_at_the_start_stays_without() -> None:
    made, (label, valid) = predictor((True, False, True)), labels()
    made.update(draw(2, D, 3, 4), label, valid)
    assert not made.prototypes[1].any()
    assert made.prototypes[0].any()
    assert made.known.tolist() == [True, False, True]


# Algorithm 2.


def test_k_means_finds_clusters_that_are_apart() -> None:
    centers = 10 * draw(4, D)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    features = (centers.repeat(20, 1) + 0.1 * draw(80, D, seed=2))[order]
    found = cluster_centers(features, 4, seed=0)
    distance = torch.cdist(centers, found)
    assert (distance.min(1).values < 0.15).all()
    assert sorted(distance.argmin(1).tolist()) == [0, 1, 2, 3]
    assert found.dtype == torch.float32
    assert torch.equal(found, cluster_centers(features, 4, seed=0))


@pytest.mark.parametrize("distinct", [1, 3])
def test_k_means_of_fewer_features_than_prototypes_repeats_them(distinct: int) -> None:
    features = draw(distinct, D)
    for rows in (features, features.repeat(4, 1)):
        found = cluster_centers(rows, 8, seed=2**40)
        assert found.shape == (8, D)
        distance = torch.cdist(found, features)
        assert distance.min(1).values.max() < 1e-5
        assert distance.argmin(1).unique().tolist() == list(range(distinct))


def test_a_class_without_features_has_no_centers() -> None:
    assert not cluster_centers(torch.empty(0, D), K, seed=0).any()


# The method.


def with_stub(**settings: Any) -> PCR:
    torch.manual_seed(0)
    tree = tiny_tree(Path("unused"), **{"name": "pcr", "prototypes": K, "warmup": 2, **settings})
    method = build_method(parse_config(tree, "tiny"), C)
    assert isinstance(method, PCR)
    torch.manual_seed(3)
    method.student = PixelNetwork(C, D)  # type: ignore[assignment]
    method.teacher = EMATeacher(method.student)
    method.predictor = predictor()
    method.predictor.temperature = T
    method.samples = FeatureBank(C, D, size=32, rows=8)
    return method


def step(iteration: int) -> Step:
    return Step(torch.tensor(iteration), 6)


def test_the_warm_up_learns_from_labels_alone_and_keeps_their_features() -> None:
    pcr, batch = with_stub(), small_batch(C, torch.float32)
    assert pcr.begin_step(0)
    losses = pcr(batch, step(0))
    output = pcr.student(pcr.normalize(batch.labeled_image))
    torch.testing.assert_close(losses["loss"], cross_entropy(output.logits, batch.label))
    assert torch.equal(losses["loss"], losses["loss_supervised"])
    assert all(value == 0 for name, value in losses.items() if name not in ("loss", "loss_supervised"))
    label = batch.label[:, ::2, ::2]  # those that the network's pixels are on
    for c in range(C):
        allowed = {tuple(row) for row in output.features.movedim(1, -1)[label == c].tolist()}
        kept = int(pcr.samples.count[c])
        assert kept == min(8, int((label == c).sum()))
        assert {tuple(row) for row in pcr.samples.features[c, :kept].tolist()} <= allowed


def test_both_predictors_learn_from_labels_and_from_confident_pseudo_labels() -> None:
    weights = {"delta_u": 0.4, "lambda_prototype": 0.7}
    pcr, batch = with_stub(**weights), small_batch(C, torch.float32)
    assert not pcr.begin_step(4)
    before = pcr.predictor.prototypes.clone()
    losses = pcr.losses(batch, step(4))

    unlabeled = pcr.pseudo_labeled(batch)
    certain = unlabeled.confidence > 0.4
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
        """In place of a CUDA graph: counts the steps since it was made or told to forget."""

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
