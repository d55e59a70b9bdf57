"""Training on several ranks: the mathematics of one process, and the same state on all ranks."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from prcl_fast.config import parse_config
from prcl_fast.engine.trainer import Trainer
from prcl_fast.losses import ProbabilisticContrast, start_counting, supervised_loss, unsupervised_loss
from prcl_fast.methods import PCR
from prcl_fast.methods.pcr import cluster_centers
from prcl_fast.models.heads import ProbabilityHead
from prcl_fast.models.sync_batch_norm import synchronize_batch_norm
from prcl_fast.ops import prototype_statistics
from prcl_fast.processes.collectives import broadcast_text, maximum, world_size
from prcl_fast.processes.replicas import DriftError, check_alike
from support.processes import Pair
from support.stub_networks import small_backbones
from support.tiny import shared_tree, tiny_tree

CPU = torch.device("cpu")
QUIET = Console(quiet=True)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _variance_head(rank: int, rows: list[slice] | None, compiled: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    head = ProbabilityHead(5, 7)
    x, weight = 3 + 2 * draw(6, 5, 4, 3), draw(6, 7, 4, 3, seed=1)
    if rows is not None:
        synchronize_batch_norm(head)
        x, weight = x[rows[rank]], weight[rows[rank]]
    x = x.clone().requires_grad_()
    y = (torch.compile(head, backend="aot_eager") if compiled else head)(x)
    (y * weight).sum().backward()
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad} | dict(head.state_dict())
    gradients = {f"{name} gradient": p.grad for name, p in head.named_parameters() if p.grad is not None}
    return found | gradients


@pytest.mark.parametrize("compiled", [False, True])
def test_the_probability_head_runs_over_the_images_of_all_processes(two: Pair, compiled: bool) -> None:
    whole = _variance_head(0, None, False)
    parts = two(_variance_head, [slice(0, 4), slice(4, 6)], compiled)
    for name, value in whole.items():
        found = parts[0][name]
        if name in ("y", "x"):
            found = torch.cat([part[name] for part in parts])
        elif name.endswith("gradient"):
            found = parts[0][name] + parts[1][name]
        else:
            assert torch.equal(parts[0][name], parts[1][name]), name
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)


def _segmentation(rank: int, rows: list[slice] | None, ignored: str, omega: str) -> dict[str, Tensor]:
    logits = draw(4, 3, 5, 5)
    label = draw(4, 9, 9, seed=1).abs().mul(2).clamp(max=2).to(torch.uint8)
    confidence = draw(4, 9, 9, seed=2).abs().clamp(max=1)
    if ignored == "rank 1":
        label[2:] = 255
    elif ignored == "most of rank 0":
        label[:2, 1:] = 255
    else:
        label[:] = 255
    if rows is not None:
        logits, label, confidence = (x[rows[rank]] for x in (logits, label, confidence))
    logits = logits.clone().requires_grad_()
    counts = start_counting(label, label, confidence, 0.5)()
    loss_s = supervised_loss(logits, label, counts=counts)
    loss_u = unsupervised_loss(logits, label, confidence, 0.5, omega=omega, counts=counts)
    (2 * loss_s + 3 * loss_u).backward()
    assert logits.grad is not None
    return {"loss_s": loss_s.detach(), "loss_u": loss_u.detach(), "gradient": logits.grad}


@pytest.mark.parametrize("omega", ["batch", "image", "pixel"])
@pytest.mark.parametrize("ignored", ["rank 1", "most of rank 0", "all"])
def test_segmentation_losses_average_to_those_of_the_whole_batch(two: Pair, ignored: str, omega: str) -> None:
    whole = _segmentation(0, None, ignored, omega)
    parts = two(_segmentation, [slice(0, 2), slice(2, 4)], ignored, omega)
    for name in ("loss_s", "loss_u"):
        torch.testing.assert_close(sum(part[name] for part in parts) / 2, whole[name])
    # Gradients are averaged over the processes.
    torch.testing.assert_close(torch.cat([part["gradient"] for part in parts]) / 2, whole["gradient"])


def _two_images() -> dict[str, Tensor]:
    """Every pixel of a class in an image has one distribution: no draw matters but those of the classes."""
    classes = torch.zeros(2, 4, 6, dtype=torch.int64)
    classes[0, 1:], classes[1, :, 5:] = 1, 1
    mu, var = draw(2, 2, 3), draw(2, 2, 3, seed=1).sigmoid()  # image, class, dimension
    image = torch.arange(2)[:, None, None].expand_as(classes)
    return {
        "mu": mu[image, classes].movedim(-1, 1).contiguous(),
        "var": var[image, classes].movedim(-1, 1).contiguous(),
        "label": classes,
        "valid": torch.ones_like(classes, dtype=torch.bool),
        "confidence": torch.full(classes.shape, 0.1),
        "seed": torch.tensor([0, 0]),
    }


def _contrast(rank: int, change: str) -> dict[str, Any]:
    batch = _two_images()
    if change == "rank 1 has nothing":
        batch["valid"][1] = False
    own = {name: value if name == "seed" else value[rank : rank + 1] for name, value in batch.items()}
    own["mu"].requires_grad_()
    contrast = ProbabilisticContrast(
        2, 3, tau=0.7, anchors=8, negatives=8, virtual_negatives=0, reduction="mean", normalize=True
    )
    loss = contrast(**own)
    loss.backward()
    state = {name: value.clone() for name, value in contrast.state_dict().items()}
    check_alike(state)
    return state | {"loss": loss.detach(), "gradient": own["mu"].grad, **contrast.diagnostics}


def test_a_process_counts_in_the_contrast_by_its_share_of_the_hard_pixels(two: Pair) -> None:
    parts = two(_contrast, "none")
    batch = _two_images()
    statistics = prototype_statistics(batch["mu"], batch["var"], batch["label"], batch["valid"], 2)
    for part in parts:
        torch.testing.assert_close(part["precision"].float(), statistics.precision)
        assert part["count"].tolist() == part["hard_per_class"].tolist() == [6 + 20, 18 + 4]
    # By hand: each process's mean over a class's anchors, weighted by its share of that class's pixels.
    pixels = torch.tensor([[6, 18], [20, 4]])
    own = [_class_means(batch, statistics.mean, statistics.variance, image) for image in range(2)]
    expected = sum((pixels[image] / pixels.sum(0) * own[image]).sum() / 2 for image in range(2))
    torch.testing.assert_close((parts[0]["loss"] + parts[1]["loss"]) / 2, expected, rtol=1e-4, atol=1e-5)


def _class_means(batch: dict[str, Tensor], mean: Tensor, variance: Tensor, image: int) -> Tensor:
    """Eq. (15) of an anchor of each class, with 8 equal negatives of the other class of its own image."""

    def score(mu_a: Tensor, var_a: Tensor, mu_b: Tensor, var_b: Tensor) -> Tensor:
        mu_a, mu_b = (x / x.norm() for x in (mu_a, mu_b))
        total = var_a + var_b
        return -0.5 * ((mu_a - mu_b).square() / total + total.log()).mean() / 0.7

    losses = []
    for c in range(2):
        pixel = [(batch["label"][image] == k).nonzero()[0].tolist() for k in range(2)]
        mu, var = (
            [batch[name][image, :, pixel[k][0], pixel[k][1]] for k in range(2)] for name in ("mu", "var")
        )
        positive = score(mu[c], var[c], mean[c], variance[c])
        negative = score(mu[c], var[c], mu[1 - c], var[1 - c])
        losses.append((positive.exp() + 8 * negative.exp()).log() - positive)
    return torch.stack(losses)


def _prototypes(rank: int | None) -> dict[str, Tensor]:
    batch = _two_images() | {"mu": draw(2, 3, 4, 6), "var": draw(2, 3, 4, 6, seed=1).sigmoid()}
    batch["label"] = torch.arange(48).view(2, 4, 6) % 5
    batch["label"][1, 2:] = 255
    if rank is not None:
        batch = {name: x if name == "seed" else x[rank : rank + 1] for name, x in batch.items()}
    contrast = ProbabilisticContrast(5, 3, tau=0.7)
    for _ in range(2):
        contrast(**batch)
    return {name: value.clone() for name, value in contrast.state_dict().items()}


def test_prototypes_are_those_of_the_whole_batch_and_the_same_bits_everywhere(two: Pair) -> None:
    whole, (first, second) = _prototypes(None), two(_prototypes)
    for name, value in whole.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-6, atol=1e-5)
    assert torch.equal(first["count"], whole["count"])


def _spread(rank: int) -> dict[str, Tensor]:
    batch = _two_images()
    own = {name: value if name == "seed" else value[rank : rank + 1] for name, value in batch.items()}
    contrast = ProbabilisticContrast(2, 3, tau=0.7, virtual_spread="class")
    contrast(**own)
    check_alike(dict(contrast.state_dict()))
    return {"spread": contrast.spread.clone()}


def test_the_spread_of_a_class_is_that_of_all_processes_pixels(two: Pair) -> None:
    parts, batch = two(_spread), _two_images()
    for c in range(2):
        # All pixels of a class in an image are alike, and each process draws as many of its own.
        first, second = (batch["mu"][i].movedim(0, -1)[batch["label"][i] == c][0] for i in range(2))
        for part in parts:
            torch.testing.assert_close(
                part["spread"][c], ((first - second) / 2).square(), rtol=1e-4, atol=1e-6
            )


def test_a_process_without_any_class_takes_part_and_gives_a_zero_in_the_graph(two: Pair) -> None:
    first, second = two(_contrast, "rank 1 has nothing")
    assert first["loss"] > 0
    assert second["loss"] == 0
    assert not second["gradient"].any()
    assert second["present_classes"] == 2
    assert second["count"].tolist() == [6, 18]


def _helpers(rank: int) -> tuple[str, list[int], str]:
    state = {"same": torch.ones(3), "other": torch.tensor([1.0, 2.0 + rank])}
    with pytest.raises(DriftError) as caught:
        check_alike(state)
    check_alike({"same": torch.full((2, 2), torch.nan), "integer": torch.arange(3)})
    return (
        broadcast_text(f"from {rank}: ä" * (1 - rank)),
        maximum(torch.tensor([rank, -rank])).tolist(),
        str(caught.value),
    )


def test_text_maximum_and_drift_are_equal_on_all_ranks(two: Pair) -> None:
    for text, most, drift in two(_helpers):
        assert text == "from 0: ä"
        assert most == [1, 0]
        assert "no longer hold the same other (1 of 2 entries differ)" in drift
    assert world_size() == 1
    assert broadcast_text("alone") == "alone"


def _steps(rank: int, config: dict[str, Any], steps: int) -> dict[str, Tensor]:
    trainer = Trainer(parse_config(config, "tiny"), QUIET)
    with contextlib.closing(trainer.batches()) as batches:
        for _ in range(steps):
            trainer.step(batches)
            check_alike(trainer.method.state_dict())
    return {name: value.clone() for name, value in trainer.method.state_dict().items()}


@pytest.mark.parametrize("sync_bn", [True, False])
def test_processes_hold_the_same_state_after_every_step(two: Pair, tmp_path: Path, sync_bn: bool) -> None:
    config = shared_tree(tmp_path / "run", sync_bn=sync_bn, accumulate=1 + sync_bn, batch_unlabeled=8)
    state, other = two(_steps, config, 3)
    assert all(torch.equal(state[name], other[name]) for name in state)
    assert all(value.isfinite().all() for value in state.values())
    mean = state["student.backbone.bn1.running_mean"]
    assert mean.abs().max() > 0


METHODS = {
    "pcr": {"name": "pcr", "warmup": 2, "delta_u": 0.1915},  # between the confidences of the first step
    "pcr prototypes alone": {"name": "pcr", "warmup": 2, "delta_u": 0.1915, "predictor": "prototype"},
    "cps": {"name": "cps", "mix": "cutmix"},
    "cps without mixing": {"name": "cps", "mix": "none"},
    "pps": {"name": "pps", "prototypes": 2, "layers": 1, "heads": 2},
    "pps without contrast": {"name": "pps", "prototypes": 2, "layers": 1, "heads": 2, "lambda_contrast": 0.0},
    "memory bank": tiny_tree(Path())["method"] | {"virtual_negatives": 0, "memory_bank": 160},
}


def _method_tree(output: Path, method: str) -> dict[str, Any]:
    config = shared_tree(output / method) | {"method": METHODS[method]}
    config["data"]["crop"] = [32, 32]
    return config


def _small_steps(rank: int, config: dict[str, Any], steps: int) -> dict[str, Tensor]:
    with small_backbones():
        return _steps(rank, config, steps)


@pytest.mark.parametrize("method", ["pcr", "pcr prototypes alone", "cps", "pps", "memory bank"])
def test_processes_of_every_method_hold_the_same_state(two: Pair, tmp_path: Path, method: str) -> None:
    state, other = two(_small_steps, _method_tree(tmp_path, method), 4)
    assert all(torch.equal(state[name], other[name]) for name in state)
    assert all(value.isfinite().all() for value in state.values())
    if method == "pcr":  # on both sides of the warm-up's end
        assert state["predictor.known"].any()
        assert 64 < state["samples.count"].max() <= 2 * 64
        assert torch.equal(state["samples.count"] > 0, state["predictor.known"])
        rows = zip(state["samples.features"], state["samples.count"], strict=True)
        centers = torch.stack([cluster_centers(features[:count], 4, 0) for features, count in rows])
        moved = state["predictor.prototypes"] - centers  # by two steps, 1 % each
        assert 0 < moved.norm() < 0.1 * centers.norm()
    if method == "memory bank":
        assert state["contrast.bank.count"].max() == 4 * 160 // 8


def _weights_of(network: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def _first_step(rank: int, config: dict[str, Any]) -> dict[str, Tensor]:
    """The losses of the first step and how the student moved; pcr's step is one after its warm-up."""
    with small_backbones():
        trainer = Trainer(parse_config(config, "tiny"), QUIET)
    method = trainer.method
    if isinstance(method, PCR):
        prototypes = method.predictor.prototypes
        method.predictor.initialize(draw(*prototypes.shape), torch.ones_like(method.predictor.known))
    before = _weights_of(method.student)
    with contextlib.closing(trainer.batches()) as batches:
        batch = next(batches)
    # Unevenly over the images, wherever they are.
    batch.label[batch.labeled_image[:, 0] > 0.5] = 255
    batch.unlabeled.inside &= batch.unlabeled.image[:, 0] < 0.5
    found = dict(trainer.train_step([batch]))
    if isinstance(method, PCR):
        found["prototypes"] = method.predictor.prototypes
    return found | {"moved": _weights_of(method.student) - before}


@pytest.mark.parametrize(
    "method", ["pcr", "pcr prototypes alone", "cps", "cps without mixing", "pps without contrast"]
)
def test_losses_of_every_method_are_those_of_one_process(two: Pair, tmp_path: Path, method: str) -> None:
    parts = two(_first_step, _method_tree(tmp_path / "two", method))
    whole = _first_step(0, _method_tree(tmp_path / "one", method))
    assert all(value > 0 for name, value in whole.items() if name.startswith("loss"))
    for name, value in whole.items():
        assert torch.equal(parts[0][name], parts[1][name]), name
        if name == "loss_contrast":  # each process draws from its own pixels
            assert 0 < float(parts[0][name]) < 2 * float(value)
        elif name == "moved":  # a rounding can change the sign that a ReLU sees, and so a pixel's gradient
            assert (parts[0][name] - value).norm() < 0.01 * value.norm()
        else:
            torch.testing.assert_close(parts[0][name], value, rtol=1e-4, atol=1e-5)
