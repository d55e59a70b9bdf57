"""sigma^2 as a detector of wrong pixels, and the movement of the probability head."""

from __future__ import annotations

import json
import math
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_evaluate import ArraySource, data_config, random_source
from torch import Tensor, nn

from prcl_fast.config import EvalConfig, parse_config
from prcl_fast.console.plain import PlainConsole
from prcl_fast.engine.evaluate import evaluate
from prcl_fast.engine.trainer import InterruptedRunError, Trainer
from prcl_fast.engine.uncertainty import (
    BINS,
    MOVED,
    ErrorDetector,
    HeadMovement,
    Uncertainty,
    explain_unlearned,
    histogram_by_error,
)
from prcl_fast.models.heads import ProbabilityHead
from prcl_fast.runs.checkpoint import load_run
from support.tiny import tiny_tree

CPU = torch.device("cpu")
QUIET = PlainConsole(quiet=True)


def pairwise_auroc(wrong: np.ndarray, right: np.ndarray) -> float:
    """P(wrong > right) + P(wrong = right) / 2, over all pairs of pixels."""
    difference = wrong.astype(np.float64)[:, None] - right.astype(np.float64)[None]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def split_pixels(truth: Tensor, label: Tensor, variance: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Variances of the wrong and of the right pixels that have a label."""
    known = truth != 255
    wrong, right = known & (truth != label), known & (truth == label)
    return variance[wrong].numpy(), variance[right].numpy()


@pytest.mark.parametrize(("low", "high"), [(0.3, 0.6), (1e-6, 1.0), (0.499, 0.501), (1e-5, 2e-5)])
def test_auroc_is_the_share_of_pairs_in_order(low: float, high: float) -> None:
    random = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 3, (2, 20, 30), generator=random, dtype=torch.uint8)
    label = torch.randint(0, 3, (2, 20, 30), generator=random, dtype=torch.uint8)
    truth[torch.rand(truth.shape, generator=random) < 0.1] = 255
    # Wrong pixels tend to larger values.
    share = torch.rand(truth.shape, generator=random) ** (1 + (truth == label).float())
    variance = low + (high - low) * share
    wrong, right = split_pixels(truth, label, variance)
    found = ErrorDetector(histogram_by_error(truth, label, variance).numpy())
    assert found.histogram.sum(axis=1).tolist() == [len(right), len(wrong)]
    expected = pairwise_auroc(wrong, right)
    assert 0.6 < expected < 0.9
    # Values within 0.03% of each other count as equal: some pairs where all lie within 0.4%.
    assert found.auroc == pytest.approx(expected, abs=0.002)
    assert found.means == pytest.approx((right.mean(), wrong.mean()), rel=3e-4)


def test_equal_variances_say_nothing_and_separate_ones_everything() -> None:
    truth, label = torch.zeros(1, 4, 4, dtype=torch.uint8), torch.zeros(1, 4, 4, dtype=torch.uint8)
    label[0, :2] = 1

    def auroc(variance: Tensor) -> float:
        return ErrorDetector(histogram_by_error(truth, label, variance).numpy()).auroc

    assert auroc(torch.full((1, 4, 4), 0.4)) == 0.5
    assert auroc(torch.where(truth == label, 0.3, 0.31)) == 1.0
    assert auroc(torch.where(truth == label, 0.31, 0.3)) == 0.0
    assert math.isnan(ErrorDetector(histogram_by_error(truth, truth, torch.rand(1, 4, 4)).numpy()).auroc)
    constant = ErrorDetector(histogram_by_error(truth, truth, torch.rand(1, 4, 4)).numpy())
    assert Uncertainty(constant, constant).summary() == {}


def test_every_value_has_a_bin_in_order_and_unlabeled_pixels_have_none() -> None:
    values = torch.cat([torch.tensor([0.0, 1e-6]), torch.logspace(-6, 0, 5000), torch.tensor([1.0])])
    values = values.sort().values[None, None]
    truth, label = torch.zeros(values.shape, dtype=torch.uint8), torch.zeros(values.shape, dtype=torch.uint8)
    places = [
        int(histogram_by_error(truth[..., :1], label[..., :1], v.view(1, 1, 1))[0].argmax())
        for v in values[0, 0, ::50]
    ]
    assert places == sorted(places)
    assert histogram_by_error(truth, label, values).sum() == values.numel()
    assert histogram_by_error(truth, label, torch.ones_like(values))[0, BINS - 1] == values.numel()
    spoilt = torch.full_like(values, math.nan)
    assert histogram_by_error(truth, label, spoilt).sum() == values.numel()
    assert histogram_by_error(torch.full_like(truth, 255), label, values).sum() == 0


class Uncertain(nn.Module):
    """Class in the red channel, times 10, and sigma^2 of three dimensions in the green one, at full size."""

    def __init__(self) -> None:
        super().__init__()
        data = data_config()
        self.mean, self.std = torch.tensor(data.mean).view(3, 1, 1), torch.tensor(data.std).view(3, 1, 1)
        self.probability = nn.Identity()

    def forward(self, x: Tensor, representations: bool = True) -> types.SimpleNamespace:
        assert not representations
        colour = x * self.std + self.mean
        wanted = torch.arange(4.0).view(1, -1, 1, 1)
        green = colour[:, 1:2]
        features = torch.cat([green / 2, green, green * 1.5], dim=1)
        return types.SimpleNamespace(logits=-((25.5 * colour[:, :1] - wanted) ** 2), features=features)


class TwoChannelSource(ArraySource):
    """As ArraySource, with a variance in the green channel."""

    def image(self, name: str) -> np.ndarray:
        image: np.ndarray = super().image(name)
        rng = np.random.default_rng(int(name))
        wrong = self.predictions[int(name)] != self.labels[int(name)]
        image[..., 1] = rng.integers(20, 120, wrong.shape) + 30 * wrong
        return image


SIZES = [(31, 40), (24, 20), (31, 40), (10, 50), (24, 20), (31, 40), (7, 9)]


def uncertain_source(count: int = 1) -> TwoChannelSource:
    source = random_source(SIZES * count)
    return TwoChannelSource(source.predictions.values(), source.labels.values())


def all_pixels(source: TwoChannelSource) -> tuple[np.ndarray, np.ndarray]:
    parts = []
    for index, truth in source.labels.items():
        variance = torch.from_numpy(source.image(str(index))[..., 1] / 255.0)
        parts.append(
            split_pixels(torch.from_numpy(truth), torch.from_numpy(source.predictions[index]), variance)
        )
    wrong, right = (np.concatenate(values) for values in zip(*parts, strict=True))
    return wrong, right


@pytest.mark.parametrize(
    "settings",
    [{}, {"flip": True}, {"mode": "sliding", "window": [16, 16], "batch": 3}, {"average": "logits"}],
)
def test_evaluation_finds_the_auroc_of_the_pixels_that_it_counts(settings: dict[str, Any]) -> None:
    source = uncertain_source()
    network = Uncertain()
    settings = {"batch": 2} | settings
    results = evaluate({"a": network}, source, data_config(), EvalConfig(**settings), CPU)
    found = results["a"].uncertainty
    assert found is not None
    wrong, right = all_pixels(source)
    assert len(wrong) + len(right) == results["a"].confusion.sum()
    expected = pairwise_auroc(wrong, right)
    assert 0.6 < expected < 0.9
    assert found.variance.auroc == pytest.approx(expected, abs=0.003)  # averages differ by rounding
    assert found.confidence.histogram.sum(axis=1).tolist() == [len(right), len(wrong)]


def test_the_confidence_is_measured_beside_sigma2() -> None:
    class Sure(Uncertain):
        """The same classes, with higher confidence where the green channel is low."""

        def forward(self, x: Tensor, representations: bool = True) -> types.SimpleNamespace:
            output = super().forward(x, representations)
            output.logits = output.logits * (2 - output.features[:, 1:2])
            return output

    result = evaluate({"a": Sure()}, uncertain_source(), data_config(), EvalConfig(), CPU)["a"].uncertainty
    assert result is not None
    # One decides by the other, but for classes at the end of the range, which have one neighbour.
    assert 0.6 < result.confidence.auroc < 0.9


def test_a_network_without_probability_head_has_no_variance() -> None:
    network = Uncertain()
    network.probability = None
    results = evaluate({"a": network}, uncertain_source(), data_config(), EvalConfig(), CPU)
    assert results["a"].uncertainty is None


@pytest.mark.parametrize("world", [2, 3])
def test_processes_add_up_their_histograms(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    source, settings = uncertain_source(3), EvalConfig(batch=2)
    whole = evaluate({"a": Uncertain()}, source, data_config(), settings, CPU)["a"].uncertainty
    assert whole is not None
    monkeypatch.setattr("prcl_fast.engine.evaluate.world_size", lambda: world)
    total = np.zeros_like(whole.variance.histogram)
    for rank in range(world):
        monkeypatch.setattr("prcl_fast.engine.evaluate.rank", lambda rank=rank: rank)
        part = evaluate({"a": Uncertain()}, source, data_config(), settings, CPU)["a"].uncertainty
        assert part is not None
        assert 0 < part.variance.histogram.sum() < whole.variance.histogram.sum()
        total += part.variance.histogram
    np.testing.assert_array_equal(total, whole.variance.histogram)


def moved(head: ProbabilityHead, movement: HeadMovement, *features: Tensor) -> float:
    with movement.watching():
        for x in features:
            head(x)
    return movement.moved()


def correlation(a: Tensor, b: Tensor) -> float:
    return float(np.corrcoef(a.double().flatten().numpy(), b.double().flatten().numpy())[0, 1])


def test_movement_is_the_variation_that_the_start_does_not_explain() -> None:
    torch.manual_seed(0)
    head = ProbabilityHead(24, 16)
    start = {name: value.clone() for name, value in head.state_dict().items()}
    movement = HeadMovement(head)
    batches = [torch.randn(2, 24, 9, 7) + 1, torch.randn(1, 24, 5, 5)]
    head.eval()
    assert moved(head, movement, *batches) == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        head.fc1 *= 3  # weight decay shrinks rows, which the forward pass normalises
        head.fc2 *= 0.5
        head.bn1.running_mean += 1
    assert moved(head, movement, *batches) == pytest.approx(0, abs=1e-6)

    with torch.no_grad():
        head.fc1 += 0.03 * torch.randn(16, 24)
        head.fc2 += 0.03 * torch.randn(16, 16)
        head.beta += 0.3
    state = {name: value.clone() for name, value in head.state_dict().items()}
    found = moved(head, movement, *batches)
    assert all(torch.equal(value, state[name]) for name, value in head.state_dict().items())  # only looks
    assert not head._forward_hooks
    maps = []
    for weights in (start, state):
        plain = ProbabilityHead(24, 16).train()
        plain.load_state_dict(weights)
        with torch.no_grad():
            maps.append(torch.cat([plain(x).mean(1).flatten() for x in batches]))
    expected = 1 - correlation(*maps) ** 2
    assert 0.02 < expected < 0.5
    assert found == pytest.approx(expected, rel=1e-4)  # sigma^2 is float32

    with torch.no_grad():
        head.fc1.normal_()
        head.fc2.normal_()
    assert moved(head, movement, torch.randn(4, 24, 40, 40)) > 0.8
    assert math.isnan(moved(head, movement))


def test_a_still_head_is_told_with_the_key_that_helps() -> None:
    sentence = explain_unlearned(0.0031, 5e-5)
    assert sentence is not None
    assert sentence.startswith("sigma^2 is not learned: 99.69% of its variation over pixels, more than 95%,")
    assert sentence.endswith("raise optim.probability_lr, now 5e-05")
    assert explain_unlearned(MOVED * 0.999, 0.0) is not None
    assert explain_unlearned(MOVED, 0.0) is None
    assert explain_unlearned(math.nan, 0.0) is None


def run_of(output: Path, console: PlainConsole = QUIET, method: Any = None, **optim: Any) -> Trainer:
    tree = tiny_tree(output, **(method or {}))
    tree["optim"] = {"lr": 0.05} | optim
    return Trainer(parse_config(tree, "tiny"), console)


def evaluations(output: Path) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "eval"]


def test_training_logs_what_sigma2_is_worth_and_says_once_that_it_stood_still(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = run_of(tmp_path / "run", PlainConsole(width=400), probability_lr=0.0)
    summary = trainer.run()
    half, end = evaluations(tmp_path / "run")
    for record in (half, end):
        assert 0 < record["variance_auroc"] < 1
        assert 0 < record["variance_auroc_student"] < 1
        assert 0 < record["confidence_auroc"] < 1
        assert 0 < record["variance_right"] < 1
        assert 0 < record["variance_wrong"] < 1
        assert record["variance_moved"] == pytest.approx(0, abs=1e-9)
        assert record["note"] == explain_unlearned(0.0, 0.0)
    assert summary["variance_auroc"] == end["variance_auroc"]
    said = capsys.readouterr().out
    assert f"variance_auroc {end['variance_auroc']:.3f}, confidence_auroc" in said
    assert "variance_moved 0.0000" in said
    assert said.count("sigma^2 is not learned") == 1

    # prcl eval finds the same.
    loaded = load_run(tmp_path / "run" / "last.pt", CPU)
    config = trainer.config
    results = evaluate(loaded.networks, trainer.source, config.data, config.eval, CPU)
    teacher, student = results["teacher"].uncertainty, results["student"].uncertainty
    assert teacher is not None
    assert student is not None
    assert teacher.summary().items() <= end.items()
    assert student.variance.auroc == end["variance_auroc_student"]


def test_a_head_that_learns_moves_and_a_run_that_goes_on_measures_from_the_same_start(tmp_path: Path) -> None:
    sharp = {"normalize": True, "tau": 0.5}  # so that six steps are enough
    whole = run_of(tmp_path / "whole", method=sharp, probability_lr=0.5)
    whole.run()
    half, end = evaluations(tmp_path / "whole")
    assert end["variance_moved"] > MOVED
    assert "note" not in end

    first = run_of(tmp_path / "halves", method=sharp, probability_lr=0.5)
    first.stop.asked = True
    with pytest.raises(InterruptedRunError):
        first.run()
    again = run_of(tmp_path / "halves", method=sharp, probability_lr=0.5)
    assert again.iteration > 0
    again.run()
    assert [record["variance_moved"] for record in evaluations(tmp_path / "halves")] == [
        half["variance_moved"],
        end["variance_moved"],
    ]


@pytest.mark.parametrize(
    "method",
    [{"name": "supervised"}, {"representation": "deterministic", "virtual_negatives": 0}],
    ids=["supervised", "deterministic"],
)
def test_a_run_without_probability_head_logs_nothing_of_it(tmp_path: Path, method: dict[str, Any]) -> None:
    summary = run_of(tmp_path / "run", method=method).run()
    for record in (*evaluations(tmp_path / "run"), summary):
        assert not [key for key in record if "variance" in key or "probability" in key or key == "note"]
