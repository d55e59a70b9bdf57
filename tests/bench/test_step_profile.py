"""`bench step-profile`: stages, rows and report of the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.step import profile as step_profile
from bench.step.profile import KIND, profile_step, report
from support.bench_command import run_bench

TINY = (
    "train.threads=1",
    "train.batch_labeled=2",
    "train.batch_unlabeled=2",
    "method.anchors=8",
    "method.negatives=8",
    "model.width=16",
    "model.dim=8",
    "data.synthetic.unlabeled=6",
    "train.device=cpu",
)


@pytest.fixture(scope="module")
def stages() -> list[dict[str, Any]]:
    """The result after every stage."""
    found: list[dict[str, Any]] = []
    profile_step("small", TINY, lambda result: found.append(json.loads(json.dumps(result))))
    return found


def test_every_stage_hands_its_result_out(stages: list[dict[str, Any]]) -> None:
    common = {"kind", "machine", "size", "overrides", "first_step_ms"}
    turns = {"ms", "host_ms", "losses"}
    assert [set(stage) for stage in stages] == [
        common,
        common | turns,
        common | turns | {"kernels", "kernel_ms", "launches"},
    ]
    assert (stages[0]["kind"], stages[0]["overrides"]) == (KIND, list(TINY))


def test_a_step_takes_time_and_the_host_no_more_than_the_step(stages: list[dict[str, Any]]) -> None:
    result = stages[-1]
    assert len(result["ms"]) == len(result["host_ms"]) == step_profile._TURNS
    assert all(0 < host <= ms for host, ms in zip(result["host_ms"], result["ms"], strict=True))
    assert set(result["losses"]) >= {"loss", "loss_contrast"}


def test_rows_are_sorted_and_add_up(stages: list[dict[str, Any]]) -> None:
    rows = stages[-1]["kernels"]
    times = [row["ms"] for row in rows]
    assert times == sorted(times, reverse=True)
    assert sum(times) == pytest.approx(stages[-1]["kernel_ms"])
    calls = {row["name"]: row["calls"] for row in rows}
    assert calls["Optimizer.step#FusedSGD.step"] == 1


def test_the_report_shows_the_largest_rows(stages: list[dict[str, Any]]) -> None:
    lines = report(stages[-1], shown=3)
    assert len(lines) == 6
    assert all(stages[-1]["kernels"][i]["name"][:20] in lines[3 + i] for i in range(3))


def test_a_mistake_in_an_override_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = run_bench(capsys, "step-profile", str(tmp_path / "x.json"), "small", "train.nothing=1")
    assert code == 2
    assert said.startswith("bench step-profile: ")
    assert "unknown key train.nothing" in said
    assert said.count("\n") == 1
