"""PPS against a plain transcription: prototypes as categories, their contrast, and their even use."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_tree
from rich.console import Console
from stub_networks import IGNORE, PixelNetwork, cross_entropy, cut_mixed, small_batch, upsampled
from torch import Tensor

from prcl_fast.config import parse_config
from prcl_fast.data.batches import Batch
from prcl_fast.engine.checkpoint import load_run
from prcl_fast.engine.trainer import Trainer
from prcl_fast.errors import InputError
from prcl_fast.losses import activation_regularization, prototypical, prototypical_contrast
from prcl_fast.methods import PPS, Step, build_method
from prcl_fast.models.network import NetworkOutput
from prcl_fast.models.query_head import QueryHead

C, N, D = 3, 2, 4
STEP = Step(torch.tensor(0), 10)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tree(output: Path, **method: Any) -> dict[str, Any]:
    settings = {"name": "pps", "prototypes": N, "layers": 1, "heads": 2} | method
    return tiny_tree(output, **settings)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


# Equations.


def plain_contrast(own: Tensor, other: Tensor, tau: float) -> Tensor:
    """Eq. (7): one positive and C n - 1 negatives, n - 1 of them of the prototype's own class."""
    total, number = own.new_zeros(()), 0
    for image in range(len(own)):
        for c in range(C):
            for j in range(N):
                anchor = own[image, c, j]
                positive = (cosine(anchor, other[image, c, j]) / tau).exp()
                negatives = sum(
                    (cosine(anchor, other[image, k, i]) / tau).exp()
                    for k in range(C)
                    for i in range(N)
                    if (k, i) != (c, j)
                )
                total = total - (positive / (positive + negatives)).log()
                number += 1
    return total / number


def test_contrast_sets_each_prototype_against_all_others_of_its_image() -> None:
    own, other = draw(2, C, N, D).requires_grad_(), draw(2, C, N, D, seed=1).requires_grad_()
    loss, expected = prototypical_contrast(own, other, 0.3), plain_contrast(own, other.detach(), 0.3)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert other.grad is None  # the other network's are constants
    (gradient,) = torch.autograd.grad(expected, own)
    torch.testing.assert_close(own.grad, gradient, rtol=1e-4, atol=1e-6)


def test_contrast_is_at_the_chance_level_where_all_prototypes_are_one() -> None:
    same = torch.ones(2, C, N, D)
    assert float(prototypical_contrast(same, same, 0.1)) == pytest.approx(math.log(C * N))


def plain_activation(scores: Tensor, label: Tensor) -> Tensor:
    """Eq. (10) and (11): KL of each present class's mean activations from the uniform ones."""
    total, present = scores.new_zeros(()), 0
    for c in range(scores.shape[1]):
        pixels = [scores[b, c, :, y, x].softmax(0) for b, y, x in (label == c).nonzero().tolist()]
        if pixels:
            share = torch.stack(pixels).mean(0)
            total = total + (share * (share * len(share)).log()).sum()
            present += 1
    return total / max(present, 1)


def activation(scores: Tensor, label: Tensor) -> Tensor:
    """Of scores [B, C, n, h, w]."""
    return activation_regularization(scores.flatten(1, 2), label, scores.shape[1])


def test_activation_regularization_is_the_divergence_from_even_use() -> None:
    scores = (3 * draw(2, C, N, 3, 4)).requires_grad_()
    label = torch.tensor([0, 1, 255, 0]).expand(2, 3, 4).clone()  # class 2 is absent
    label[1, 0] = C  # no class either
    loss, expected = activation(scores, label), plain_activation(scores, label)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    got, want = (torch.autograd.grad(value, scores)[0] for value in (loss, expected))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    assert want.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_the_losses_on_prototypes(dtype: torch.dtype) -> None:
    # One prototype takes all of more pixels than float16 can count.
    scores = torch.zeros(1, 1, N, 300, 300)
    scores[:, :, 0] = 20
    label = torch.zeros(1, 300, 300, dtype=torch.uint8)
    own, other = draw(2, C, N, D, dtype=torch.float32), draw(2, C, N, D, seed=1, dtype=torch.float32)
    expected = activation(scores, label), prototypical_contrast(own, other, 0.1)
    with torch.autocast("cpu", dtype=dtype):
        got = activation(scores, label), prototypical_contrast(own, other, 0.1)
    assert got == expected


def test_activation_regularization_is_0_for_even_use_and_log_n_where_one_does_everything() -> None:
    label = torch.zeros(1, 2, 4, dtype=torch.uint8)
    scores = torch.zeros(1, C, 4, 2, 4)
    assert float(activation(scores, label)) == pytest.approx(0.0, abs=1e-7)
    # Even over the class, though each pixel has its own prototype.
    scores[0, 0, torch.arange(8) % 4, torch.arange(8) // 4, torch.arange(8) % 4] = 100.0
    assert float(activation(scores, label)) == pytest.approx(0.0, abs=1e-7)
    scores[0, 0, 1] = 200.0
    assert float(activation(scores, label)) == pytest.approx(math.log(4), abs=1e-6)


def test_activation_regularization_without_a_labeled_pixel_is_a_zero_in_the_graph() -> None:
    scores = draw(1, C, N, 3, 4).requires_grad_()
    loss = activation(scores, torch.full((1, 3, 4), 255))
    loss.backward()
    assert loss == 0
    assert scores.grad is not None
    assert not scores.grad.any()


def test_activation_regularization_of_split_pixels_averages_to_that_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores = 3 * draw(4, C, N, 3, 4)
    label = torch.randint(0, C + 1, (4, 3, 4), generator=torch.Generator().manual_seed(1))
    label[1:][label[1:] == 1] = 0  # class 1 on the first process alone
    whole = scores.clone().requires_grad_()
    expected = activation(whole, label)
    expected.backward()
    parts = [(scores[rows].clone().requires_grad_(), label[rows]) for rows in (slice(0, 1), slice(1, 4))]
    sent: list[Tensor] = []
    monkeypatch.setattr(prototypical, "world_size", lambda: 2)
    monkeypatch.setattr(prototypical, "summed", lambda values: sent.append(values) or values)
    for part in parts:
        activation(*part)
    monkeypatch.setattr(prototypical, "summed", lambda _: sent[0] + sent[1])
    losses = [activation(*part) for part in parts]
    mean = (losses[0] + losses[1]) / 2
    mean.backward()
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(torch.cat([part[0].grad for part in parts]), whole.grad)


# The head.


def test_a_class_scores_as_its_nearest_prototype() -> None:
    torch.manual_seed(0)
    head = QueryHead(5, 8, D, C, per_class=N, layers=2, heads=2, tau=0.2).double().eval()
    features = draw(2, 5, 6, 7)
    logits, (flat_scores, prototypes) = head(features)
    scores = flat_scores.unflatten(1, (C, N))
    embedding = head.embedding(features)
    for b in range(2):
        for y in range(6):
            for x in range(7):
                plain = torch.stack(
                    [
                        torch.stack(
                            [cosine(embedding[b, :, y, x], prototypes[b, c, j]) / 0.2 for j in range(N)]
                        )
                        for c in range(C)
                    ]
                )
                torch.testing.assert_close(scores[b, :, :, y, x], plain)
                torch.testing.assert_close(logits[b, :, y, x], plain.amax(1))
    assert torch.equal(logits.argmax(1), flat_scores.argmax(1) // N)


def test_prototypes_are_made_for_each_image_from_its_own_pixels() -> None:
    torch.manual_seed(0)
    head = QueryHead(5, 8, D, C, per_class=N, layers=1, heads=2, tau=0.2).eval()
    features = draw(2, 5, 6, 7, dtype=torch.float32)
    before = head(features)[1].prototypes
    features[1] += 1
    after = head(features)[1].prototypes
    assert torch.equal(before[0], after[0])
    assert (before[1] != after[1]).any(-1).all()


# The method.


def with_stubs(**settings: Any) -> PPS:
    torch.manual_seed(0)
    method = build_method(parse_config(tree(Path("unused"), **settings), "tiny"), C)
    assert isinstance(method, PPS)
    method.student, method.second = (PixelNetwork(C, prototypes=N) for _ in range(2))  # type: ignore[assignment]
    return method.double()


def scores_of(output: NetworkOutput) -> Tensor:
    """[B, C, n, h, w]."""
    assert output.prototypes is not None
    return output.prototypes.scores.unflatten(1, (C, N))


def plain_losses(pps: PPS, batch: Batch) -> dict[str, Tensor]:
    networks = (pps.student, pps.second)
    assert batch.unlabeled_image is not None
    assert batch.inside is not None
    assert batch.strong is not None

    def said(scores: Tensor, known: Tensor) -> Tensor:
        """Eq. (6): the number c n + j of the nearest prototype."""
        full = torch.stack([upsampled(scores[:, c, j, None]) for c in range(C) for j in range(N)], dim=2)
        return full[:, 0].argmax(1).masked_fill(~known, IGNORE)

    def categories(scores: Tensor) -> Tensor:
        return torch.stack([scores[:, c, j] for c in range(C) for j in range(N)], dim=1)

    labeled = [network(pps.normalize(batch.labeled_image)) for network in networks]
    weak = [network(pps.normalize(batch.unlabeled_image)) for network in networks]
    labels = [said(scores_of(output), batch.inside) for output in weak]
    image = batch.unlabeled_image
    if pps.mix == "cutmix":
        labels = [cut_mixed(label, batch.strong) for label in labels]
        image = cut_mixed(image, batch.strong)
    unlabeled = [network(pps.normalize(image)) for network in networks]
    terms = {name: torch.zeros((), dtype=torch.float64) for name in ("s", "cross", "contrast", "activation")}
    for own, other in ((0, 1), (1, 0)):
        terms["s"] += cross_entropy(scores_of(labeled[own]).amax(2), batch.label)
        terms["cross"] += cross_entropy(categories(scores_of(unlabeled[own])), labels[other])
        if pps.mix == "none":
            known = batch.label != IGNORE
            label = said(scores_of(labeled[other]), known)
            terms["cross"] += cross_entropy(categories(scores_of(labeled[own])), label)
        found = [
            torch.cat([labeled[k].prototypes.prototypes, unlabeled[k].prototypes.prototypes])
            for k in range(2)
        ]
        terms["contrast"] += plain_contrast(found[own], found[other].detach(), 0.3)
        terms["activation"] += plain_activation(scores_of(labeled[own]), batch.label[:, ::2, ::2])
    return terms


@pytest.mark.parametrize("mix", ["cutmix", "none"])
def test_the_loss_is_the_weighted_sum_of_the_four_terms(mix: str) -> None:
    weights = {"lambda_cross": 0.7, "lambda_contrast": 1.1, "lambda_activation": 0.3}
    pps, batch = with_stubs(mix=mix, tau=0.3, **weights), small_batch(C)
    losses, terms = pps.losses(batch, STEP), plain_losses(pps, batch)
    close = {"rtol": 1e-5, "atol": 1e-6}
    for name, key in (("supervised", "s"), ("cross", "cross"), ("contrast", "contrast")):
        torch.testing.assert_close(losses[f"loss_{name}"].double(), terms[key], **close)
    torch.testing.assert_close(losses["loss_activation"].double(), terms["activation"], **close)
    total = terms["s"] + 0.7 * terms["cross"] + 1.1 * terms["contrast"] + 0.3 * terms["activation"]
    torch.testing.assert_close(losses["loss"].double(), total, **close)
    parameters = [
        *(pps.student.embed.weight, pps.student.queries),
        *(pps.second.embed.weight, pps.second.queries),
    ]
    expected = torch.autograd.grad(total, parameters)
    for got, want in zip(torch.autograd.grad(losses["loss"], parameters), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_both_networks_learn_one_parameter_of_queries_before_and_after_a_checkpoint(tmp_path: Path) -> None:
    settings = tree(tmp_path / "run")
    settings["data"]["crop"] = [32, 32]
    settings["train"] |= {"iterations": 1}
    config = parse_config(settings, "tiny")
    built = build_method(config, C)
    built.to(memory_format=torch.channels_last)
    trainer = Trainer(config, Console(quiet=True))
    before = trainer.method.student.classifier.queries.detach().clone()
    trainer.run()
    for method in (built, trainer.method):
        assert method.student.classifier.queries is method.second.classifier.queries
    queries = trainer.method.student.classifier.queries
    assert not torch.equal(queries, before)
    learned = [p for group in trainer.train_step.optimizer.param_groups for p in group["params"]]
    assert sum(p is queries for p in learned) == 1
    assert len({id(p) for p in learned}) == len(learned)
    own = set(map(id, trainer.method.parameters()))
    assert own == set(map(id, learned))
    again = Trainer(config, Console(quiet=True)).method
    networks = load_run(config.output, torch.device("cpu")).networks
    for first, second in ((again.student, again.second), (networks["student"], networks["second"])):
        assert first.classifier.queries is second.classifier.queries
        assert torch.equal(first.classifier.queries, queries)
        assert not torch.equal(first.backbone.conv1.weight, second.backbone.conv1.weight)


def test_more_prototypes_than_labels_can_number_are_refused() -> None:
    config = parse_config(tree(Path("unused"), prototypes=5), "tiny")
    with pytest.raises(
        InputError, match=r"method\.prototypes: at most 255 prototypes in all, got 5 for each of 52"
    ):
        build_method(config, 52)
    assert build_method(config, 51).num_classes == 51
