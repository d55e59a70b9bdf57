"""`bench step`: its configurations, fair turns, results and mistakes."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.ops.run import read_result
from bench.step import command as step
from bench.step import data as step_data
from bench.step import run as step_run
from bench.step import worker as step_worker
from bench.step.data import DataSet, file_config, size_config, write_images
from bench.step.run import KIND, Plan, measure
from bench.step.setup import LOSSES
from bench.step.worker import CANDIDATES, Worker
from prcl_fast.config import Config, parse_config
from prcl_fast.data.source import IGNORE
from prcl_fast.data.sources import build_source
from support.bench_command import run_bench
from support.paths import CONFIGS
from support.tiny import tiny_tree


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """The tiny run with the settings common to all candidates of the benchmark."""
    tree = tiny_tree(tmp_path / "run")
    tree["method"]["prototype"] = "local"
    tree["data"]["scan"] = False
    return parse_config(tree, "test")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs `python -m bench step ARGUMENTS`; exit status, standard output, standard error."""
    return functools.partial(run_bench, capsys, "step")


# The configurations.


def test_generated_images_are_a_data_set(tmp_path: Path) -> None:
    write_images(tmp_path, DataSet("", 48, 64, 5, ".jpg", 4))
    tree = tiny_tree(tmp_path / "run")
    tree["data"] = {"kind": "folder", "root": str(tmp_path), "classes": str(tmp_path / "classes.txt")}
    tree["data"] |= {subset: str(tmp_path / f"{subset}.txt") for subset in ("labeled", "unlabeled", "val")}
    source = build_source(parse_config(tree, "test").data)
    assert len(source.classes) == 5
    found = set()
    for name in source.splits["labeled"].names:
        assert source.image(name).shape == (48, 64, 3)
        found |= set(np.unique(source.label(name)))
    assert found == {0, 1, 2, 3, 4, IGNORE}


@pytest.mark.parametrize(("size", "crop", "classes"), [("voc", 512, 21), ("cityscapes", 768, 19)])
def test_sizes_are_the_papers_settings(
    size: str, crop: int, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = step_data.DATA_SETS[size]
    small = DataSet(full.config, 24, 32, full.classes, full.suffix, full.labels_at_once)
    monkeypatch.setitem(step_data.DATA_SETS, size, small)
    config = size_config(size, tmp_path, ["train.threads=2", "train.device=cpu"])
    assert config.data.crop == [crop, crop]
    assert (config.model.backbone, config.model.dim, config.model.weights) == ("resnet101", 256, None)
    assert (config.train.batch_labeled, config.train.batch_unlabeled) == (8, 8)
    assert (config.method.delta_w, config.method.delta_s, config.method.prototype) == (0, 1, "local")
    assert (config.train.threads, config.train.amp, config.data.workers) == (2, "off", 0)
    assert len(build_source(config.data).classes) == classes


def test_what_the_caller_asks_for_goes_before_what_is_common(tmp_path: Path) -> None:
    file = CONFIGS / "demo.yaml"
    config = file_config(file, tmp_path, ["train.device=cpu", "data.workers=3", "method.delta_s=0.5"])
    assert (config.data.workers, config.method.delta_s, config.method.delta_w) == (3, 0.5, 0)
    assert config.output == tmp_path / "runs"


# Turns, results, mistakes.


class _Recorded:
    """A worker that records its turns."""

    def __init__(self, name: str, log: list[tuple[str, int]], alive: set[str]) -> None:
        self.name, self.log, self.alive = name, log, alive
        self.times: list[float] = []
        self.report = self.failure = None
        alive.add(name)

    def run(self, steps: int) -> None:
        self.log.append((self.name, len(self.alive)))
        self.times.append(1.0)

    def finish(self) -> None:
        self.stop()

    def stop(self) -> None:
        self.alive.discard(self.name)


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Recorded turns: candidate, and number of candidates alive."""
    log: list[tuple[str, int]] = []
    alive: set[str] = set()
    monkeypatch.setattr(step_run, "_start", lambda plan, name: _Recorded(name, log, alive))
    return log


def test_candidates_take_turns_and_each_comes_first(config: Config, turns: list[tuple[str, int]]) -> None:
    plan = Plan("test", config, "cpu", ("published", "eager", "ours"), 4, 1, 0, one_at_a_time=False)
    result = measure(plan, lambda text: None)
    assert [alive for _, alive in turns] == [3] * 12
    rounds = [[name for name, _ in turns[start : start + 3]] for start in range(0, 12, 3)]
    assert rounds[0] == ["ours", "eager", "published"]
    assert all(len(set(names)) == 3 for names in rounds)
    assert {names[0] for names in rounds} == {"published", "eager", "ours"}
    assert [row["candidate"] for row in result["rows"]] == ["published", "eager", "ours"]


def test_one_at_a_time_ours_is_first_and_the_published_step_last_and_short(
    config: Config, turns: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(step_run.time, "monotonic", lambda: next(clock))  # two seconds a turn
    plan = Plan("test", config, "cpu", ("published", "eager", "ours"), 4, 5, 0, True, published_seconds=5.0)
    result = measure(plan, lambda text: None)
    halves = [("ours", 1)] * 2 + [("eager", 1)] * 2
    assert turns == [*halves, *halves, *[("published", 1)] * 3]
    assert [row["steps_a_round"] for row in result["rows"]] == [1, 5, 5]
    assert any("published is timed after all others, for 5 s at most" in x for x in result["same_for_all"])


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_the_result_so_far_is_there_after_every_candidate(
    config: Config, turns: list[tuple[str, int]], one_at_a_time: bool
) -> None:
    written: list[list[str]] = []

    def finished(result: dict[str, Any]) -> None:
        json.dumps(result, allow_nan=False)
        written.append([row["candidate"] for row in result["rows"] if row["note"] != "not run yet"])

    plan = Plan("test", config, "cpu", ("published", "eager", "ours"), 1, 1, 0, one_at_a_time)
    measure(plan, lambda text: None, finished)
    assert written == [["ours"], ["eager", "ours"], ["published", "eager", "ours"]]


def test_a_file_holds_the_candidates_that_ran_before_the_benchmark_was_stopped(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "result.json"

    def stopped(plan: Plan, progress: Any, finished: Callable[[dict[str, Any]], None]) -> None:
        finished({"kind": KIND, "rows": []})
        assert read_result(file, KIND)["rows"] == []
        sys.exit(143)

    monkeypatch.setattr(step, "measure", stopped)
    assert run("--json", str(file))[0] == 143


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two processes, one of which cannot run here."""
    tree = tiny_tree(tmp_path_factory.mktemp("step") / "run", prototype="local")
    tree["train"]["device"] = "cpu"
    plan = Plan("tiny", parse_config(tree, "test"), "cpu", ("eager", "ours-graph"), 3, 1, 1, False)
    return measure(plan, lambda text: None)


def test_a_result_says_times_memory_and_why_a_candidate_has_none(measured: dict[str, Any]) -> None:
    eager, graph = measured["rows"]
    assert eager["candidate"] == "eager"
    assert eager["note"] == ""
    assert eager["ms_20"] <= eager["ms"] <= eager["ms_80"]
    assert (eager["rounds"], eager["steps_a_round"], eager["warmup_steps"]) == (3, 1, 1)
    assert eager["images_per_second"] == pytest.approx(4000 / eager["ms"])
    assert eager["peak_bytes"] > eager["base_bytes"] > 0
    assert all(math.isfinite(value) for value in eager["losses"].values())
    assert {"student", "contrast", "backward"} <= eager["parts_ms"].keys()
    assert graph["ms"] is None
    assert "train.graph: needs a CUDA device" in graph["note"]
    assert any("delta_w 0 and delta_s 1" in line for line in measured["same_for_all"])
    assert measured["options"]["changes"]["ours-graph"] == ["train.graph=true"]
    json.dumps(measured, allow_nan=False)


def test_the_figure_of_a_result_is_drawn(run: Any, measured: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_text(json.dumps(measured))
    assert read_result(file, KIND) == json.loads(file.read_text())
    code, out, _ = run("--plot", str(file), "--out", str(tmp_path / "figures"))
    assert code == 0
    files = [tmp_path / "figures" / name for name in ("result.png", "result_parts.png")]
    assert out.split() == [str(file) for file in files]
    for file in files:
        assert (np.asarray(Image.open(file).convert("L")) < 100).mean() > 0.002


def test_a_warm_up_ends_when_its_time_is_over(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting:
        student = torch.nn.Linear(1, 1)
        steps = 0

        def step(self) -> dict[str, float]:
            self.steps += 1
            return dict.fromkeys(LOSSES, 0.0)

        def close(self) -> None:
            pass

    sent: list[Any] = []
    training, clock = Counting(), iter(range(0, 1000, 2))
    monkeypatch.setitem(CANDIDATES, "published", (lambda config: training, ()))
    monkeypatch.setattr(step_worker.time, "perf_counter", lambda: next(clock))  # two seconds a step
    asked = iter((1, None))  # one turn of one step
    connection: Any = SimpleNamespace(send=sent.append, recv=lambda: next(asked))
    step_worker._work(connection, "published", config, warmup=100, seconds=5.0)
    assert sent[0] == "ready"
    assert sent[-1].warmup_steps == 2
    assert training.steps == 4  # and one more for the times of its parts


def test_a_worker_that_dies_is_a_failure_with_its_status(config: Config) -> None:
    worker = Worker.start("published", config, warmup=0)
    try:
        assert worker.failure is None
        worker.process.kill()
        worker.process.join()
        worker.run(1)
        assert worker.failure == "its process ended with status -9"
        assert worker.times == []
    finally:
        worker.stop()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--size", "huge"), "--size: 'huge'"),
        (("--candidates", "publishd"), "did you mean published?"),
        (("method.mix=cutmix",), "method.mix: cutmix"),
        (("method.anchors_per_set=16",), "ours-shared16"),
        (("train.amp=fp16",), "train.amp: fp16"),
        (("method.name=supervised",), "method.name: 'supervised'"),
        (("--config", "none.yaml"), "none.yaml"),
        (("--plot", "none.json"), "none.json: cannot be read"),
        (("--plot", __file__), "is not JSON"),
    ],
)
def test_a_mistake_is_one_line_with_status_2(run: Any, arguments: tuple[str, ...], named: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out, err.strip().count("\n")) == (2, "", 0)
    assert named in err
