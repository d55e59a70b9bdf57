"""`prcl profile`: the parts of a step, and the written files."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from prcl_fast.analysis.step_time import draw_step_time
from prcl_fast.analysis.style import save_figure
from prcl_fast.cli.main import app
from prcl_fast.errors import InputError
from prcl_fast.planning.part_meter import PartTimer
from prcl_fast.planning.step_profile import busy_share
from prcl_fast.step_parts import PARTS, listening, part
from support.tiny import tiny_tree

CPU = torch.device("cpu")


def test_parts_and_the_rest_add_up_to_the_step() -> None:
    timer = PartTimer(CPU)
    with listening(timer):
        for _ in range(2):
            with timer.step():
                for _ in range(2):
                    with part("student"):
                        time.sleep(0.01)
                with part("backward"):
                    time.sleep(0.005)
                time.sleep(0.003)
    with part("teacher"):  # nobody listens any more
        pass
    first, second = timer.steps()
    assert list(first) == list(second) == ["student", "backward", "other"]
    assert first["student"] >= 20
    assert first["backward"] >= 5
    assert first["other"] >= 3


@pytest.mark.parametrize(
    ("intervals", "share"),
    [
        ([(0, 10)], 1.0),
        ([(0, 4), (6, 10)], 0.8),
        ([(0, 6), (2, 4), (5, 8), (8, 10)], 1.0),
        ([(5, 6), (0, 1), (9, 10)], 0.3),
        ([], 0.0),
    ],
)
def test_the_busy_share_counts_overlapping_work_once(
    intervals: list[tuple[float, float]], share: float
) -> None:
    assert busy_share(intervals) == pytest.approx(share)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(tmp_path / "run")))
    return path


def test_profile_measures_every_part_and_writes_nothing_of_the_run(tmp_path: Path, config_file: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["profile", str(config_file), "--steps", "2", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "run").exists()
    found = json.loads((out / "profile.json").read_text())
    assert set(found["parts_ms"]) == {*PARTS, "other"}
    assert all(value >= 0 for value in found["parts_ms"].values())
    assert found["images"] == 4
    assert 0 < found["busy"] <= 1
    for name in ("contrast", "data wait", "step, as it trains", "ms an image"):
        assert name in result.output
    with gzip.open(out / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"student", "backward", "contrast", "step 0"} <= names
    assert Image.open(out / "step_time.png").width > 500
    assert sorted(path.name for path in out.iterdir()) == ["profile.json", "step_time.png", "trace.json.gz"]


def test_profile_says_in_one_line_that_its_folder_cannot_be_made(tmp_path: Path, config_file: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    result = CliRunner().invoke(app, ["profile", str(config_file), "--out", str(blocked / "out")])
    assert isinstance(result.exception, InputError)
    assert "--out" in str(result.exception)


def test_a_figure_of_several_candidates_is_drawn(tmp_path: Path) -> None:
    rows = {
        "before": {"student": 100.0, "backward": 300.0, "other": 5.0},
        "after": {"student": 40.0, "ema": 1.0},
    }
    save_figure(draw_step_time(rows), tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").height > 200


def test_a_cpu_has_no_memory_of_parts_and_the_profiler_reports_nothing(
    tmp_path: Path, config_file: Path
) -> None:
    """A process of its own: PyTorch's C++ code writes to the standard error of the process."""
    command = [sys.executable, "-m", "prcl_fast.cli.main", "profile", str(config_file), "--steps", "2"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "peak MB" not in result.stdout
    assert "peak resident memory " in result.stdout
    assert result.stderr.splitlines()[1:] == [
        "2 steps as they train",
        "2 steps, part by part",
        "3 steps with PyTorch's profiler",
    ]
