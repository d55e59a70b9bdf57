"""PPS against plain transcriptions of the paper's equations in float64 [Chen and Lian, ACM MM 2022]."""

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
from prcl_fast.engine.memory_estimate import MemoryEstimator, tensor_bytes
from prcl_fast.engine.trainer import Trainer
from prcl_fast.errors import InputError
from prcl_fast.losses import odds_logits, one_prototype_per_class, prototypical_contrast
from prcl_fast.methods import PPS, Step, build_method
from prcl_fast.methods.resolution import at_resolution
from prcl_fast.models.network import NetworkOutput
from prcl_fast.models.query_decoder import QueryDecoder, sine_positions
from prcl_fast.models.query_head import QueryHead
from prcl_fast.ops import sample_anchors, sample_negatives

C, N, D = 3, 2, 4
K = C * N
STEP = Step(torch.tensor(4), 10)
SEED = torch.tensor([5, 7])
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tree(output: Path, **method: Any) -> dict[str, Any]:
    settings = {"name": "pps", "prototypes": N, "layers": 1, "heads": 2, "anchors": 8, "negatives": 8}
    return tiny_tree(output, **settings | method)


# Eq. (7).


def plain_contrast(
    features: Tensor, prototype: Tensor, valid: Tensor, seed: Tensor, tau: float, n: int, r: int
) -> Tensor:
    """Eq. (7) pixel by pixel, of the pixels that the samplers draw, as a mean over its terms."""
    pixels = features.movedim(1, -1).reshape(-1, features.shape[1])
    assigned, known = prototype.flatten(), valid.flatten()
    anchors = sample_anchors(prototype, valid, valid, K, n, seed)
    uniform = torch.zeros(K, K, dtype=torch.float64)
    present = sorted(set(assigned[known].tolist()))
    for k in present:
        for other in present:
            if other != k and len(present) > 1:
                uniform[k, other] = 1 / (len(present) - 1)
    negatives = sample_negatives(uniform, prototype, valid, K, 1, r, seed)
    total, terms = features.new_zeros(()), 0
    for k in range(K):
        for i in range(n):
            own, positive = int(anchors[k, i]), int(anchors[k, (i + 1) % n])
            if own in (-1, positive) or (negatives[k] < 0).any():
                continue
            assert assigned[own] == assigned[positive] == k  # Psi
            assert known[own]
            assert known[positive]
            numerator = (pixels[own] @ pixels[positive] / tau).exp()
            others = features.new_zeros(())
            for j in negatives[k, 0].tolist():
                assert assigned[j] != k  # O
                assert known[j]
                others = others + (pixels[own] @ pixels[j] / tau).exp()
            total = total - (numerator / (numerator + others)).log()
            terms += 1
    return total / max(terms, 1)


def contrast(features: Tensor, prototype: Tensor, valid: Tensor, **settings: Any) -> Tensor:
    given = {"tau": 0.3, "num_anchors": 6, "num_negatives": 5, "normalize": False} | settings
    return prototypical_contrast(features, prototype, valid, K, SEED, **given).loss


def pixels_of_prototypes() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    prototype = torch.randint(K - 1, (2, 4, 5), generator=generator)  # the last prototype is absent
    valid = torch.rand(2, 4, 5, generator=generator) < 0.8
    return 0.5 * draw(2, D, 4, 5), prototype, valid


@pytest.mark.parametrize("normalize", [False, True])
def test_contrast_is_between_pixels_that_share_a_prototype_eq_7(normalize: bool) -> None:
    features, prototype, valid = pixels_of_prototypes()
    features.requires_grad_()
    loss = contrast(features, prototype, valid, normalize=normalize)
    embedded = features / features.square().sum(1, keepdim=True).sqrt() if normalize else features
    expected = plain_contrast(embedded, prototype, valid, SEED, 0.3, 6, 5)
    torch.testing.assert_close(loss.double(), expected, **CLOSE)
    got, want = (torch.autograd.grad(value, features)[0] for value in (loss, expected))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert want.any()


def test_contrast_has_negatives_of_the_same_class_and_of_every_other_prototype_alike() -> None:
    # Prototypes 0 and 1 are of one class; 2 has nine pixels in ten of the others'.
    prototype = torch.full((1, 20, 20), 2)
    prototype[:, 0, :10], prototype[:, 0, 10:] = 0, 1
    features = torch.nn.functional.one_hot(prototype, 3).movedim(-1, 1).double()
    # Scores are 1 / tau for the positive and 0 for negatives: the loss counts them alone ...
    expected = math.log1p(1000 * math.exp(-1 / 0.5))
    valid = torch.ones_like(prototype, dtype=torch.bool)
    settings: dict[str, Any] = {"tau": 0.5, "num_anchors": 50, "num_negatives": 1000}
    assert float(contrast(features, prototype, valid, **settings)) == pytest.approx(expected, rel=1e-5)
    # ... and where prototype 1's pixels look like 0's, about half of 0's negatives do.
    features[:, 0] += features[:, 1]
    features[:, 1] = 0
    alike = contrast(features, prototype, valid, **settings)
    pair = math.log1p(500 + 500 * math.exp(-1 / 0.5))
    assert float(alike) == pytest.approx((2 * pair + expected) / 3, rel=0.01)


def test_contrast_is_at_chance_where_all_pixels_are_one() -> None:
    _, prototype, valid = pixels_of_prototypes()
    loss = contrast(torch.ones(2, D, 4, 5), prototype, valid, num_negatives=9)
    assert float(loss) == pytest.approx(math.log(10))


@pytest.mark.parametrize("known", [0, 1])
def test_contrast_without_a_pair_is_a_zero_in_the_graph(known: int) -> None:
    features, prototype, valid = pixels_of_prototypes()
    prototype[valid] = torch.arange(int(valid.sum())) * known  # one prototype; or many of a pixel, or two
    features.requires_grad_()
    if known:
        valid.view(-1)[4:] = False
    loss = contrast(features, prototype, valid)
    loss.backward()
    assert loss == 0
    assert features.grad is not None
    assert not features.grad.any()


# Eq. (8), (9).


def test_odds_logits_are_those_of_eq_9() -> None:
    score = (2 * draw(2, 4, 50)).clamp(-12, 3)
    t = 1 / (1 + (-score).exp())  # sigmoid
    expected = (t / (1 - t)).softmax(1)  # softmax(psi(sigmoid(S)))
    torch.testing.assert_close(odds_logits(score).softmax(1), expected, rtol=1e-12, atol=1e-12)


def test_odds_logits_keep_order_gradient_and_range_where_the_odds_overflow() -> None:
    score = torch.tensor([[-200.0, 0.0, 3.0, 17.0, 90.0, 1000.0]], requires_grad=True)
    assert (score.sigmoid() / (1 - score.sigmoid())).isinf().any()  # eq. (9) as it is written
    logits = odds_logits(score)
    assert logits.isfinite().all()
    assert (logits.diff() > 0).all()
    (gradient,) = torch.autograd.grad(logits.sum(), score)
    expected = torch.tensor([[0.0, 1.0, *[math.exp(3)] * 4]])
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_exponentials_and_contrast_in_float32(dtype: torch.dtype) -> None:
    features, prototype, valid = pixels_of_prototypes()
    features = features.to(dtype)
    score = (5 * draw(2, C, 3, 4)).to(dtype)
    expected = contrast(features, prototype, valid), odds_logits(score)
    with torch.autocast("cpu", dtype=dtype):
        got = contrast(features, prototype, valid), odds_logits(score)
    assert got[0].dtype == got[1].dtype == torch.float32
    assert got[0] == expected[0]
    assert torch.equal(got[1], expected[1])


# Eq. (10).


def test_one_prototype_of_each_class_is_drawn_for_all_pixels_eq_10() -> None:
    scores = [draw(2, K, 3, 4, seed=seed) for seed in range(2)]
    drawn = set()
    for step in range(40):
        first, second = one_prototype_per_class(scores, C, torch.tensor([1, step]))
        again, _ = one_prototype_per_class(scores, C, torch.tensor([1, step]))
        assert torch.equal(first, again)
        choice = [
            next(j for j in range(N) if torch.equal(first[:, c], scores[0][:, N * c + j])) for c in range(C)
        ]
        for c, j in enumerate(choice):
            assert torch.equal(second[:, c], scores[1][:, N * c + j])
        drawn.add(tuple(choice))
    assert len(drawn) == N**C  # each class for itself


def test_prototypes_are_drawn_equally_often() -> None:
    number = torch.arange(5 * 4).view(1, 20, 1, 1)
    draws = [one_prototype_per_class([number], 5, torch.tensor([1, step]))[0] for step in range(2000)]
    counts = torch.stack(draws).flatten().bincount(minlength=20)
    assert (counts - 500).abs().max() < 5 * math.sqrt(2000 * 0.25 * 0.75)


# The head.


def attention(layer: torch.nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax of scaled dot products, head by head, of rows [N, D]."""
    dim, heads = layer.embed_dim, layer.num_heads
    q, k, v = (
        x @ layer.in_proj_weight[i * dim : (i + 1) * dim].T + layer.in_proj_bias[i * dim : (i + 1) * dim]
        for i, x in enumerate((query, key, value))
    )
    size = dim // heads
    found = []
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        found.append((q[:, own] @ k[:, own].T / math.sqrt(size)).softmax(1) @ v[:, own])
    return torch.cat(found, dim=1) @ layer.out_proj.weight.T + layer.out_proj.bias


def plain_decoder(decoder: QueryDecoder, features: Tensor) -> Tensor:
    """MaskFormer's decoder (post-norm) and mask embedding on one map [in, h, w], without its dropout."""
    _, height, width = features.shape
    weight, bias = decoder.project.weight[:, :, 0, 0], decoder.project.bias
    assert bias is not None
    memory = torch.stack([weight @ features[:, y, x] + bias for y in range(height) for x in range(width)])
    dim = memory.shape[1]
    positions = torch.zeros_like(memory)
    for y in range(height):
        for x in range(width):
            for i in range(dim // 2):
                period = 10000 ** (2 * (i // 2) / (dim // 2))
                wave = math.cos if i % 2 else math.sin
                positions[y * width + x, i] = wave((y + 1) / height * 2 * math.pi / period)
                positions[y * width + x, dim // 2 + i] = wave((x + 1) / width * 2 * math.pi / period)
    target, queries = torch.zeros_like(decoder.queries), decoder.queries
    for layer in decoder.layers:
        own = attention(layer.self_attention, target + queries, target + queries, target)
        target = layer.norm1(target + own)
        seen = attention(layer.cross_attention, target + queries, memory + positions, memory)
        target = layer.norm2(target + seen)
        target = layer.norm3(target + layer.linear2(layer.linear1(target).clamp(min=0)))
    target = decoder.norm(target)
    for linear in (decoder.mask_embed[0], decoder.mask_embed[2]):
        target = linear(target).clamp(min=0)
    return decoder.mask_embed[4](target)


def test_prototypes_are_what_a_transformer_decoder_makes_of_queries_and_the_backbones_map() -> None:
    torch.manual_seed(0)
    decoder = QueryDecoder(6, 8, K, layers=2, heads=2).double()
    features = draw(2, 6, 3, 4)
    prototypes = decoder(features)
    for image in range(2):
        # Positions are float32.
        torch.testing.assert_close(prototypes[image], plain_decoder(decoder, features[image]), **CLOSE)
    assert decoder.layers[0].linear1.out_features == 64
    assert QueryDecoder(6, 256, K, layers=1, heads=8).layers[0].linear1.out_features == 2048  # MaskFormer's


def test_sine_positions_tell_rows_and_columns_apart() -> None:
    positions = sine_positions(3, 4, 8, device=torch.device("cpu"))
    assert len(positions.unique(dim=0)) == 12
    assert torch.equal(positions.view(3, 4, 8)[:, 0, :4], positions.view(3, 4, 8)[:, 3, :4])
    assert torch.equal(positions.view(3, 4, 8)[0, :, 4:], positions.view(3, 4, 8)[2, :, 4:])


def head(**settings: Any) -> QueryHead:
    torch.manual_seed(0)
    given = {"per_class": N, "layers": 1, "heads": 2, "projection_dim": 3} | settings
    return QueryHead(5, 8, 6, D, C, **given).double().eval()


def test_scores_are_dot_products_and_a_class_has_the_sum_of_its_prototypes_eq_8() -> None:
    own = head()
    features, high = draw(2, 5, 6, 7), draw(2, 6, 2, 3, seed=1)
    logits, (scores, projection) = own(features, high, project=True)
    embedding, prototypes = own.embedding(features), own.decoder(high)
    assert projection.shape == (2, 3, 6, 7)
    for b in range(2):
        for y in range(6):
            for x in range(7):
                plain = [embedding[b, :, y, x] @ prototypes[b, k] for k in range(K)]
                torch.testing.assert_close(scores[b, :, y, x], torch.stack(plain))
                sums = [sum(plain[N * c : N * (c + 1)]) for c in range(C)]
                torch.testing.assert_close(logits[b, :, y, x], torch.stack(sums))
                hidden = own.projector[0].weight[:, :, 0, 0] @ embedding[b, :, y, x] + own.projector[0].bias
                low = own.projector[2].weight[:, :, 0, 0] @ hidden.clamp(min=0) + own.projector[2].bias
                torch.testing.assert_close(projection[b, :, y, x], low)


def test_prototypes_are_made_for_each_image_from_the_backbones_map() -> None:
    own = head()
    features, high = draw(2, 5, 6, 7), draw(2, 6, 2, 3, seed=1)
    before = own(features, high, project=False)[1]
    assert before.projection is None
    high[1] += draw(6, 2, 3, seed=2)
    after = own(features, high, project=False)[1]
    assert torch.equal(before.scores[0], after.scores[0])
    assert (before.scores[1] != after.scores[1]).all()


# The method.


def with_stubs(**settings: Any) -> PPS:
    torch.manual_seed(0)
    method = build_method(parse_config(tree(Path("unused"), **settings), "tiny"), C)
    assert isinstance(method, PPS)
    method.student, method.second = (PixelNetwork(C, prototypes=N) for _ in range(2))  # type: ignore[assignment]
    with torch.no_grad():
        for network in method.learners():
            network.embed.weight.mul_(0.15)  # sums stay where the odds are exact
    return method.double()


def scores_of(output: NetworkOutput) -> Tensor:
    """P_m [B, C * n, h, w]."""
    assert output.prototypes is not None
    return output.prototypes.scores


def class_sums(scores: Tensor) -> Tensor:
    """Eq. (8) without f."""
    return torch.stack([sum(scores[:, N * c + j] for j in range(N)) for c in range(C)], dim=1)


def plain_losses(pps: PPS, batch: Batch, assignment: str) -> dict[str, Tensor]:
    networks = (pps.student, pps.second)
    assert batch.unlabeled_image is not None
    assert batch.inside is not None
    assert batch.strong is not None

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
    weak = [network(pps.normalize(batch.unlabeled_image)) for network in networks]
    prototypes = [said(scores_of(output), batch.inside) for output in weak]
    classes = [said(class_sums(scores_of(output)), batch.inside) for output in weak]
    image, inside = batch.unlabeled_image, batch.inside
    if pps.mix == "cutmix":
        prototypes = [cut_mixed(label, batch.strong) for label in prototypes]
        classes = [cut_mixed(label, batch.strong) for label in classes]
        image, inside = cut_mixed(image, batch.strong), cut_mixed(inside, batch.strong)
    unlabeled = [network(pps.normalize(image)) for network in networks]
    numbers = [torch.arange(K)[None, :, None, None]]
    (chosen,) = one_prototype_per_class(numbers, C, torch.tensor([pps.run_seed, STEP.iteration]))
    chosen = chosen.flatten()
    terms = {name: torch.zeros((), dtype=torch.float64) for name in ("s", "cross", "activation")}
    for own, other in ((0, 1), (1, 0)):
        terms["s"] += supervised(scores_of(labeled[own]))
        terms["cross"] += cross_entropy(scores_of(unlabeled[own]), prototypes[other])
        if pps.mix == "none":
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
    assert batch.inside is not None
    assert batch.unlabeled_image is not None
    batch.label.fill_(0)
    batch.inside.fill_(True)
    for network in pps.learners():  # prototypes 1 and 2 are never the most similar ones
        network.queries.data[0, 1] = network.queries.data[1, 0] = -1e3 * network.queries.data[0, 0]
    pps.losses(batch, STEP)
    images = pps.normalize(torch.cat([batch.labeled_image, batch.unlabeled_image]))
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
        """Whether the two have in common what `shared` says, and nothing else."""
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
