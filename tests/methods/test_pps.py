"""PPS against plain transcriptions of the paper's equations in float64 [Chen and Lian, ACM MM 2022]."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from prcl_fast.config import parse_config
from prcl_fast.data.batches import Batch
from prcl_fast.engine.trainer import Trainer
from prcl_fast.errors import InputError
from prcl_fast.losses import one_prototype_per_class
from prcl_fast.methods import PPS, StepIndex, build_method
from prcl_fast.models.network import NetworkOutput, at_resolution
from prcl_fast.planning.memory_estimate import MemoryEstimator, tensor_bytes
from prcl_fast.runs.checkpoint import load_run
from support.plain_pps import CLOSE, C, K, N, plain_contrast
from support.stub_networks import IGNORE, PixelNetwork, cross_entropy, cut_mixed, small_batch, upsampled
from support.tiny import tiny_tree

STEP = StepIndex(torch.tensor(4), 10)


def tree(output: Path, **method: Any) -> dict[str, Any]:
    settings = {"name": "pps", "prototypes": N, "layers": 1, "heads": 2, "anchors": 8, "negatives": 8}
    return tiny_tree(output, **settings | method)


def with_stubs(**settings: Any) -> PPS:
    torch.manual_seed(0)
    method = build_method(parse_config(tree(Path("unused"), **settings), "tiny"), C)
    assert isinstance(method, PPS)
    method.student, method.second = (PixelNetwork(C, prototypes=N) for _ in range(2))  # type: ignore[assignment]
    with torch.no_grad():
        for network in method.learners():
            network.embed.weight.mul_(0.15)  # keeps the sums below 3, where the odds are exact
    return method.double()


def scores_of(output: NetworkOutput) -> Tensor:
    """P_m [B, C * n, h, w]."""
    assert output.prototype_scores is not None
    return output.prototype_scores


def class_sums(scores: Tensor) -> Tensor:
    """Eq. (8) without f."""
    return torch.stack([sum(scores[:, N * c + j] for j in range(N)) for c in range(C)], dim=1)


def plain_losses(pps: PPS, batch: Batch, assignment: str) -> dict[str, Tensor]:
    networks = (pps.student, pps.second)

    def said(scores: Tensor, known: Tensor) -> Tensor:
        return upsampled(scores).argmax(1).masked_fill(~known, IGNORE)

    def supervised(scores: Tensor) -> Tensor:
        """Eq. (3) on eq. (8), (9), pixel by pixel."""
        total, kept = scores.new_zeros(()), 0
        sums = class_sums(upsampled(scores))
        assert 0.5 < sums.max() < 3
        for b, y, x in (batch.label != IGNORE).nonzero().tolist():
            s = sums[b, :, y, x]
            t = 1 / (1 + (-s).exp())
            p = (t / (1 - t)).softmax(0) if assignment == "odds" else s.softmax(0)
            total, kept = total - p[int(batch.label[b, y, x])].log(), kept + 1
        return total / kept

    labeled = [network(pps.normalize(batch.labeled_image)) for network in networks]
    weak = [network(pps.normalize(batch.unlabeled.image)) for network in networks]
    prototypes = [said(scores_of(output), batch.unlabeled.inside) for output in weak]
    classes = [said(class_sums(scores_of(output)), batch.unlabeled.inside) for output in weak]
    image, inside = batch.unlabeled.image, batch.unlabeled.inside
    if pps.settings.mix == "cutmix":
        prototypes = [cut_mixed(label, batch.unlabeled.strong) for label in prototypes]
        classes = [cut_mixed(label, batch.unlabeled.strong) for label in classes]
        image, inside = cut_mixed(image, batch.unlabeled.strong), cut_mixed(inside, batch.unlabeled.strong)
    unlabeled = [network(pps.normalize(image)) for network in networks]
    numbers = [torch.arange(K)[None, :, None, None]]
    (chosen,) = one_prototype_per_class(numbers, C, torch.tensor([pps.run_seed, STEP.iteration]))
    chosen = chosen.flatten()
    terms = {name: torch.zeros((), dtype=torch.float64) for name in ("s", "cross", "activation")}
    for own, other in ((0, 1), (1, 0)):
        terms["s"] += supervised(scores_of(labeled[own]))
        terms["cross"] += cross_entropy(scores_of(unlabeled[own]), prototypes[other])
        if pps.settings.mix == "none":
            label = said(scores_of(labeled[other]), batch.label != IGNORE)
            terms["cross"] += cross_entropy(scores_of(labeled[own]), label)
        terms["activation"] += cross_entropy(scores_of(labeled[own])[:, chosen], batch.label)
        terms["activation"] += cross_entropy(scores_of(unlabeled[own])[:, chosen], classes[other])
    found = [torch.cat([labeled[k].features, unlabeled[k].features]).square() for k in range(2)]
    assigned = [torch.cat([scores_of(labeled[k]), scores_of(unlabeled[k])]).argmax(1) for k in range(2)]
    size = found[0].shape[-2:]
    valid = torch.cat([at_resolution(batch.label != IGNORE, size), at_resolution(inside, size)])
    terms["contrast"] = plain_contrast(
        torch.cat(found), torch.cat(assigned), torch.cat([valid, valid]), batch.seed, 0.4, 8, 8
    )
    return terms


@pytest.mark.parametrize("assignment", ["odds", "softmax"])
@pytest.mark.parametrize("mix", ["cutmix", "none"])
def test_the_loss_is_the_weighted_sum_of_the_four_terms_eq_4(mix: str, assignment: str) -> None:
    weights = {"lambda_cross": 0.7, "lambda_contrast": 1.1, "lambda_activation": 0.3}
    pps = with_stubs(mix=mix, tau=0.4, normalize=False, assignment=assignment, **weights)
    batch = small_batch(C)
    losses, terms = pps.losses(batch, STEP), plain_losses(pps, batch, assignment)
    names = {"supervised": "s", "cross": "cross", "contrast": "contrast", "activation": "activation"}
    for name, key in names.items():
        torch.testing.assert_close(losses[f"loss_{name}"].double(), terms[key], **CLOSE)
    total = terms["s"] + 0.7 * terms["cross"] + 1.1 * terms["contrast"] + 0.3 * terms["activation"]
    torch.testing.assert_close(losses["loss"].double(), total, **CLOSE)
    parameters = [
        *(pps.student.embed.weight, pps.student.queries),
        *(pps.second.embed.weight, pps.second.queries),
    ]
    expected = torch.autograd.grad(total, parameters)
    for got, want in zip(torch.autograd.grad(losses["loss"], parameters), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    # The warm-up has the same L_s.
    pps.begin_step(0)
    pps.warming_up = True
    torch.testing.assert_close(pps(batch, STEP)["loss"].double(), terms["s"], **CLOSE)


def test_the_weights_are_the_papers() -> None:
    method = parse_config(tree(Path("unused")), "tiny").method
    assert (method.lambda_contrast, method.lambda_cross, method.lambda_activation) == (0.5, 1.5, 0.01)


def test_the_diagnostics_say_chance_and_how_many_prototypes_have_pixels() -> None:
    pps, batch = with_stubs(mix="none"), small_batch(C)
    assert "chance" not in pps.diagnostics()
    batch.label.fill_(0)
    batch.unlabeled.inside.fill_(True)
    for network in pps.learners():  # prototypes 1 and 2 are never the most similar ones
        network.queries.data[0, 1] = network.queries.data[1, 0] = -1e3 * network.queries.data[0, 0]
    pps.losses(batch, STEP)
    images = pps.normalize(torch.cat([batch.labeled_image, batch.unlabeled.image]))
    used = torch.cat([scores_of(network(images)) for network in pps.learners()]).argmax(1).unique()
    assert 2 <= len(used) < K
    found = pps.diagnostics()
    assert found["chance"] == pytest.approx(math.log(9))
    assert found["prototypes_used"] == len(used)


@pytest.mark.parametrize("shared", ["decoder", "queries"])
def test_what_networks_share_is_one_before_and_after_a_checkpoint(tmp_path: Path, shared: str) -> None:
    settings = tree(tmp_path / "run", shared=shared)
    settings["data"]["crop"] = [32, 32]
    settings["train"] |= {"iterations": 1}
    config = parse_config(settings, "tiny")
    built = build_method(config, C)
    built.to(memory_format=torch.channels_last)
    trainer = Trainer(config, Console(quiet=True))
    before = trainer.method.student.classifier.decoder.queries.detach().clone()
    trainer.run()

    def common(first: Any, second: Any) -> bool:
        """Whether the two share exactly the parameters that `shared` names."""
        own = [first.classifier.decoder.queries is second.classifier.decoder.queries]
        if shared == "decoder":
            own.append(first.classifier.decoder is second.classifier.decoder)
        shared_ids = set(map(id, first.parameters())) & set(map(id, second.parameters()))
        wanted = first.classifier.decoder.parameters() if shared == "decoder" else [before]
        return all(own) and len(shared_ids) == len(list(wanted))

    for method in (built, trainer.method):
        assert common(method.student, method.second)
    queries = trainer.method.student.classifier.decoder.queries
    assert not torch.equal(queries, before)
    learned = [p for group in trainer.train_step.optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in learned}) == len(learned)
    assert set(map(id, trainer.method.parameters())) == set(map(id, learned))
    again = Trainer(config, Console(quiet=True)).method
    networks = load_run(config.output, torch.device("cpu")).networks
    for first, second in ((again.student, again.second), (networks["student"], networks["second"])):
        assert common(first, second)
        assert torch.equal(first.classifier.decoder.queries, queries)
        assert not torch.equal(first.backbone.conv1.weight, second.backbone.conv1.weight)


def test_the_memory_of_what_networks_share_is_counted_once() -> None:
    config = parse_config(tree(Path("unused")), "tiny")
    states = MemoryEstimator(config, C, torch.device("cpu")).states()
    method = build_method(config, C)
    own = tensor_bytes([*method.student.parameters(), *method.student.buffers()])
    decoder = tensor_bytes(method.student.classifier.decoder.parameters())
    assert states.student == own
    assert states.teacher == own - decoder
    assert 0 <= states.prototypes < 100  # the seed


def test_more_prototypes_than_labels_can_number_are_refused() -> None:
    config = parse_config(tree(Path("unused"), prototypes=5), "tiny")
    with pytest.raises(
        InputError, match=r"method\.prototypes: at most 255 prototypes in all, got 5 for each of 52"
    ):
        build_method(config, 52)
    assert build_method(config, 51).num_classes == 51


def test_a_width_that_positions_cannot_have_is_refused() -> None:
    settings = tree(Path("unused"))
    settings["model"]["dim"] = 6
    with pytest.raises(InputError, match=r"model\.dim: must be a multiple of 4 for method pps, got 6"):
        parse_config(settings, "tiny")
