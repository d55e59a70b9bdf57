"""`bench same-losses`: differences, bounds and controls."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from bench import compared_runs
from bench.step import same_losses
from prcl_fast.config import Config
from support.tiny import tiny_tree


def test_differences_are_relative_and_of_the_worst_term() -> None:
    plain = torch.tensor([[1.0, 4.0], [1.0, 4.0]], dtype=torch.float64)
    other = torch.tensor([[1.0, 4.4], [1.5, 4.0]], dtype=torch.float64)
    found = same_losses.compared(plain, other)
    assert found["equal_steps"] == 0
    assert abs(found["first"] - 0.1) < 1e-12
    assert abs(found["windows"] - 0.25) < 1e-12
    assert same_losses.compared(plain, plain)["equal_steps"] == 2


NUDGED = {"variant": same_losses.NUDGED, "exact": False, "first": 1e-7, "windows": 0.1, "whole": 0.01}
SAME = {"variant": "cache-ram", "exact": True, "first": 0.0, "windows": 0.0, "whole": 0.0}


def test_a_run_is_held_to_its_first_step_and_then_to_the_control() -> None:
    run = {**NUDGED, "variant": "compile"}
    assert same_losses.held(run, [NUDGED])
    assert same_losses.held({**run, "windows": 0.19}, [NUDGED])
    assert not same_losses.held({**run, "windows": 0.21}, [NUDGED])
    assert not same_losses.held({**run, "whole": 0.03}, [NUDGED])
    assert not same_losses.held({**run, "first": 1e-3}, [NUDGED])
    assert same_losses.held(SAME, [NUDGED])
    assert not same_losses.held({**SAME, "windows": 1e-9}, [NUDGED])
    for wrong in (SAME, run):
        assert not same_losses.held({**wrong, "windows": math.nan}, [NUDGED])


def test_a_run_that_should_be_equal_is_held_to_the_control_only_where_equal_runs_differ() -> None:
    again = {**NUDGED, "variant": same_losses.AGAIN, "first": 1e-3, "windows": 0.2, "whole": 0.02}
    assert same_losses.held({**SAME, "first": 1.9e-3, "windows": 0.39, "whole": 0.039}, [NUDGED, again])
    for key, value in (("first", 2.1e-3), ("windows", 0.41), ("whole", 0.041)):
        assert not same_losses.held({**SAME, key: value}, [NUDGED, again])
    equal = {**SAME, "variant": same_losses.AGAIN}
    assert same_losses.held(SAME, [NUDGED, equal])
    assert not same_losses.held({**SAME, "windows": 1e-9}, [NUDGED, equal])


@pytest.mark.parametrize(("disk", "status"), [(0.05, 0), (0.7, 1)])
def test_on_a_gpu_a_second_plain_run_is_a_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: float, status: int
) -> None:
    file, result = tmp_path / "tiny.yaml", tmp_path / "result.json"
    file.write_text(yaml.safe_dump(tiny_tree(tmp_path / "run")))
    monkeypatch.setattr(same_losses, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(compared_runs.machine, "describe", lambda device: {"device_type": device})
    distances = iter((0.0, 0.3, 0.1, 0.25, disk))

    def losses(config: Config, steps: int, *, nudged: bool = False) -> torch.Tensor:
        curve = torch.ones(steps, 1, dtype=torch.float64)
        curve[1:] += next(distances)
        return curve

    monkeypatch.setattr(same_losses, "losses", losses)
    options = ["--steps", "4", "--only", "cache-ram,cache-disk", "--json", str(result)]
    assert same_losses.main([str(file), *options]) == status
    names = [row["variant"] for row in json.loads(result.read_text())["rows"]]
    assert names == [same_losses.NUDGED, same_losses.AGAIN, "cache-ram", "cache-disk"]


def test_cached_images_leave_every_loss_as_it_is_and_a_last_digit_does_not(tmp_path: Path) -> None:
    file, result = tmp_path / "tiny.yaml", tmp_path / "result.json"
    file.write_text(yaml.safe_dump(tiny_tree(tmp_path / "run")))
    options = ["--steps", "4", "--only", "cache-ram,cache-disk", "--json", str(result)]
    assert same_losses.main([str(file), *options]) == 0
    control, ram, disk = json.loads(result.read_text())["rows"]
    assert control["equal_steps"] < 4
    assert ram["equal_steps"] == disk["equal_steps"] == 4
    assert not (tmp_path / "run").exists()
