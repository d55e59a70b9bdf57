"""`prcl plan`: its memory agrees with real steps, and its advice fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

from prcl_fast.cli.plan import plan_command
from prcl_fast.config import Config, load_config, override_config, parse_config
from prcl_fast.errors import InputError
from prcl_fast.methods import PCR, StepIndex, build_method
from prcl_fast.planning import batch_plan, plan
from prcl_fast.planning.memory_estimate import (
    LiveBytes,
    MemoryEstimator,
    PassBytes,
    StateBytes,
    count_saved,
)
from prcl_fast.planning.step_timer import StepMeasurement, random_batch
from support.paths import CONFIGS
from support.tiny import tiny_tree

CPU = torch.device("cpu")
CLASSES = 6


class QuickEstimator:
    """Replaces fake tensors: 1000 bytes of states, and max(20 n, 40 + 10 n) bytes for n images."""

    def __init__(self, config: Config, num_classes: int, device: torch.device) -> None:
        self.device = device

    def states(self) -> StateBytes:
        return StateBytes(student=400, teacher=400, prototypes=0, momentum=200)

    def gradients(self) -> int:
        return 200

    def one_pass(self, labeled: int, unlabeled: int, *, accumulates: bool) -> PassBytes:
        images = labeled + unlabeled
        return PassBytes(labeled, unlabeled, 9 * images, max(20 * images, 40 + 10 * images) + accumulates)


class QuickTimer:
    """Replaces real steps: an image takes 1 s, an update 10 s; each pair needs `beyond` bytes more."""

    beyond = 0

    def __init__(self, *_: Any) -> None:
        pass

    def measure(self, labeled: int, unlabeled: int, seconds: float) -> StepMeasurement:
        images = labeled + unlabeled
        peak = 1000 + max(20 * images, 40 + 10 * images) + labeled * self.beyond
        return StepMeasurement(labeled, unlabeled, 3, float(images), 10.0, peak)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(plan, "MemoryEstimator", QuickEstimator)
    monkeypatch.setattr(plan, "StepTimer", QuickTimer)
    monkeypatch.setitem(plan._SECONDS, "cpu", 1e6)
    monkeypatch.setitem(batch_plan._HELD_BACK, "cpu", 0.0)
    return monkeypatch


def with_limit(quick: pytest.MonkeyPatch, limit: int) -> None:
    quick.setattr(plan, "free_memory", lambda device: int(limit / batch_plan.MARGIN) + 1)


def tiny_config(tmp_path: Path, *overrides: str, **method: Any) -> Config:
    return override_config(parse_config(tiny_tree(tmp_path / "run", **method), "tiny"), overrides)


def real_pass(config: Config, amp: str) -> tuple[int, int]:
    """Saved bytes and peak bytes of the second of two real passes over 4 + 4 images."""
    method = build_method(config, CLASSES).to(memory_format=torch.channels_last)
    method.train()
    state = [*method.parameters(), *method.buffers()]
    step = StepIndex(torch.zeros((), dtype=torch.int64), 10)
    with LiveBytes(state) as live:
        for _ in range(2):
            batch = random_batch(config, CLASSES, 4, 4, CPU)
            with count_saved(state) as saved, torch.autocast("cpu", torch.bfloat16, amp == "bf16"):
                loss = method.losses(batch, step)["loss"]
            loss.backward()
            method.zero_grad(set_to_none=True)
            del batch, loss
    return saved(), live.peak


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_the_estimate_counts_what_a_real_pass_keeps(tmp_path: Path, amp: str) -> None:
    config = tiny_config(tmp_path, f"train.amp={amp}")
    estimate = MemoryEstimator(config, CLASSES, CPU).one_pass(4, 4, accumulates=False)
    saved, peak = real_pass(config, amp)
    # Kernels may keep a few statistics that their fake versions do not make.
    assert estimate.saved == pytest.approx(saved, rel=2e-3)
    assert estimate.peak == pytest.approx(peak, rel=2e-3)


def test_states_are_exact_and_gradients_that_accumulate_are_there_all_the_time(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    estimator = MemoryEstimator(config, CLASSES, CPU)
    method = build_method(config, CLASSES)
    student = sum(x.nbytes for x in (*method.student.parameters(), *method.student.buffers()))
    learned = sum(x.nbytes for x in method.student.parameters())
    states = estimator.states()
    assert (states.student, states.teacher, states.momentum) == (student, student, learned)
    assert states.prototypes == sum(x.nbytes for x in method.contrast.buffers())
    assert estimator.gradients() == learned
    accumulating = estimator.one_pass(2, 2, accumulates=True)
    assert accumulating.peak > learned + accumulating.saved
    assert MemoryEstimator(tiny_config(tmp_path, name="supervised"), CLASSES, CPU).states().teacher == 0


@pytest.mark.parametrize("predictor", ["both", "prototype"])
def test_networks_that_share_their_tensors_count_once(tmp_path: Path, predictor: str) -> None:
    config = tiny_config(tmp_path, name="pcr", predictor=predictor, warmup=1)
    method = build_method(config, CLASSES)
    states = MemoryEstimator(config, CLASSES, CPU).states()
    assert isinstance(method, PCR)
    assert method.samples is not None
    assert states.student == states.teacher
    assert states.prototypes == sum(
        x.nbytes for module in (method.predictor, method.samples) for x in module.buffers()
    )


def test_a_batch_that_does_not_fit_gets_the_fewest_passes_that_make_it_fit(
    tmp_path: Path, quick: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, "train.batch_labeled=16", "train.batch_unlabeled=16")
    with_limit(quick, 1000 + 20 * 16)  # one byte too few for 8 + 8 that accumulate
    found = plan.make_plan(config)
    assert found.memory.total == 1000 + 20 * 32
    assert found.memory.fits is False
    assert found.remedy is not None
    assert found.remedy.overrides == ["train.accumulate=4"]
    assert (found.remedy.micro.labeled, found.remedy.micro.bytes) == (4, 1000 + 20 * 8 + 1)
    assert found.time is not None
    assert found.time.step_seconds == pytest.approx(4 * 8 + 10)
    then = plan.make_plan(override_config(config, found.remedy.overrides))
    assert then.memory.fits
    assert then.remedy is None


@pytest.mark.parametrize("images", [2, 3, 5, 50])
def test_the_largest_pass_fits_and_one_image_pair_more_does_not(
    tmp_path: Path, quick: pytest.MonkeyPatch, images: int
) -> None:
    with_limit(quick, 1000 + 20 * 2 * images)
    found = plan.make_plan(tiny_config(tmp_path)).largest
    assert found is not None
    assert (found.labeled, found.unlabeled, found.bytes) == (images, images, 1000 + 40 * images)


def test_without_a_teacher_unlabeled_images_take_nothing(tmp_path: Path, quick: pytest.MonkeyPatch) -> None:
    with_limit(quick, 1000 + 20 * 7)
    found = plan.make_plan(tiny_config(tmp_path, name="supervised"))
    assert found.memory.total == 1000 + 40 + 10 * 2
    assert found.largest is not None
    assert (found.largest.labeled, found.largest.unlabeled) == (7, 0)


@pytest.mark.parametrize(("mix", "least"), [("classmix", 2), ("none", 1)])
def test_mixing_keeps_two_unlabeled_images_in_each_pass(
    tmp_path: Path, quick: pytest.MonkeyPatch, mix: str, least: int
) -> None:
    config = tiny_config(tmp_path, "train.batch_labeled=4", "train.batch_unlabeled=4", f"method.mix={mix}")
    with_limit(quick, 1000)
    found = plan.make_plan(config)
    assert found.time is None
    assert found.largest is None
    assert found.remedy is not None
    assert found.remedy.accumulate is None
    assert found.remedy.micro.unlabeled == least


def test_the_time_of_a_run_counts_every_pass_and_one_update_a_step(
    tmp_path: Path, quick: pytest.MonkeyPatch
) -> None:
    config = tiny_config(
        tmp_path,
        "train.batch_labeled=8",
        "train.batch_unlabeled=8",
        "train.accumulate=2",
        "train.iterations=7",
    )
    time = plan.make_plan(config).time
    assert time is not None
    assert [(m.labeled, m.unlabeled) for m in time.measured] == [(2, 2), (4, 4)]
    assert time.run_seconds == pytest.approx(7 * (2 * 8 + 10))


def test_what_real_steps_took_beyond_the_estimate_is_added(tmp_path: Path, quick: pytest.MonkeyPatch) -> None:
    quick.setattr(QuickTimer, "beyond", 5)
    with_limit(quick, 1000 + 10 * 2 * 20 + 5 * 10)
    found = plan.make_plan(tiny_config(tmp_path, "train.batch_labeled=4", "train.batch_unlabeled=4"))
    assert found.memory.overhead == 5 * 4
    assert found.memory.total == 1000 + 20 * 8 + 5 * 4
    assert found.largest is not None
    assert found.largest.labeled == 10


def test_an_allocators_share_is_added_beyond_the_measured_sizes(
    tmp_path: Path, quick: pytest.MonkeyPatch
) -> None:
    quick.setitem(batch_plan._HELD_BACK, "cpu", 0.5)
    with_limit(quick, 1000 + 20 * 8 + 30 * 12)  # 8 images are measured
    found = plan.make_plan(tiny_config(tmp_path, "train.batch_labeled=4", "train.batch_unlabeled=4"))
    assert found.memory.overhead == 0
    assert found.largest is not None
    assert found.largest.labeled == 10


def test_a_smaller_batch_is_told_how_to_reach_the_papers(quick: pytest.MonkeyPatch) -> None:
    overrides = ["train.batch_labeled=4", "train.batch_unlabeled=4"]
    config = load_config(CONFIGS / "voc" / "base.yaml", overrides)
    for limit, more in ((2000, []), (1000 + 20 * 8 + 1, ["train.accumulate=2"])):
        with_limit(quick, limit)
        found = plan.make_plan(config).paper_batch
        assert found is not None
        assert found.overrides == ["train.batch_labeled=8", "train.batch_unlabeled=8", *more]


def app() -> typer.Typer:
    command = typer.Typer(pretty_exceptions_enable=False)
    command.command()(plan_command)
    return command


def test_the_command_measures_prints_json_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MemoryEstimator", QuickEstimator)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tiny_tree(tmp_path / "run")))
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(app(), [str(file), "train.iterations=10", "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert sorted(tmp_path.rglob("*")) == before
    assert said["num_classes"] == CLASSES
    time = said["time"]
    assert 0 < time["update_seconds"] < time["step_seconds"]
    assert said["memory"]["fits"]
    assert time["run_seconds"] == pytest.approx(10 * (time["pass_seconds"] + time["update_seconds"]))
    assert said["paper"] is None


def test_the_tables_hold_memory_time_batch_and_paper(tmp_path: Path, quick: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tiny_tree(tmp_path / "run")))
    result = CliRunner().invoke(app(), [str(file), "train.iterations=3600", "train.graph=true"])
    assert result.exit_code == 0, result.output
    for part in (
        "kept for the backward pass",
        "14 h 0 min",  # 3600 x (4 + 10) s
        "without loading data",
        "batch: fits",
        "largest pass that fits",
        "has no such data set",
        "train.graph: needs a CUDA device",
    ):
        assert part in result.stdout, part


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.iteration=3", "iterations"),
        ("train.device=cuda:63", "cuda:63"),
        ("data.classes=nowhere.txt", "nowhere.txt: no such file"),
    ],
)
def test_a_mistake_is_one_line(override: str, message: str) -> None:
    file = str(CONFIGS / "camvid" / "prcl.yaml")
    result = CliRunner().invoke(app(), [file, "data.classes=[sky, road]", override])
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
