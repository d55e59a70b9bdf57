"""The comparison of runs that should have the same losses."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from conftest import tiny_tree

from bench import same_losses


def test_differences_are_relative_and_of_the_worst_term() -> None:
    plain = torch.tensor([[1.0, 4.0], [1.0, 4.0]], dtype=torch.float64)
    other = torch.tensor([[1.0, 4.4], [1.5, 4.0]], dtype=torch.float64)
    found = same_losses.compared(plain, other)
    assert found["equal_steps"] == 0
    assert abs(found["first"] - 0.1) < 1e-12
    assert abs(found["windows"] - 0.25) < 1e-12
    assert same_losses.compared(plain, plain)["equal_steps"] == 2


def test_a_run_is_held_to_its_first_step_and_then_to_the_control() -> None:
    control = {"exact": False, "first": 1e-7, "windows": 0.1, "whole": 0.01}
    assert same_losses.held(control, control)
    assert same_losses.held({**control, "windows": 0.19}, control)
    assert not same_losses.held({**control, "windows": 0.21}, control)
    assert not same_losses.held({**control, "whole": 0.03}, control)
    assert not same_losses.held({**control, "first": 1e-3}, control)
    exact = {"exact": True, "first": 0.0, "windows": 0.0, "whole": 0.0}
    assert same_losses.held(exact, control)
    assert not same_losses.held({**exact, "windows": 1e-9}, control)


def test_cached_images_leave_every_loss_as_it_is_and_a_last_digit_does_not(tmp_path: Path) -> None:
    file, result = tmp_path / "tiny.yaml", tmp_path / "result.json"
    file.write_text(yaml.safe_dump(tiny_tree(tmp_path / "run")))
    options = ["--steps", "4", "--only", "cache-ram,cache-disk", "--json", str(result)]
    assert same_losses.main([str(file), *options]) == 0
    control, ram, disk = json.loads(result.read_text())["rows"]
    assert control["equal_steps"] < 4
    assert ram["equal_steps"] == disk["equal_steps"] == 4
    assert not (tmp_path / "run").exists()
