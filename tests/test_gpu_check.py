"""The check on a machine with a GPU: what can be known of it without one."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import gpu_check

ROOT = Path(gpu_check.__file__).parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_refuses_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err.strip() == "gpu-check: PyTorch sees no CUDA device: nothing was checked"
    assert not (tmp_path / "out").exists()


def test_a_step_ends_with_its_children_when_its_time_is_over(tmp_path: Path) -> None:
    child = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True)"
    step = gpu_check.Step("slow", (sys.executable, "-c", child + "; import time; time.sleep(60)"), 3)
    result = gpu_check.run_step(step, tmp_path, 100.0)
    assert (result.status, result.detail) == ("failed", "stopped after 3 s")
    pid = (tmp_path / "slow.log").read_text().strip()
    for _ in range(50):
        state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True, check=False)
        if not state.stdout.strip() or state.stdout.startswith("Z"):
            break
        time.sleep(0.1)
    assert not state.stdout.strip() or state.stdout.startswith("Z")


def test_steps_report_how_they_ended_and_the_summary_says_so(tmp_path: Path) -> None:
    python = sys.executable
    steps = [
        gpu_check.Step("good", (python, "-c", "print('hello')"), 20),
        gpu_check.Step("bad", (python, "-c", "import sys; sys.exit(3)"), 20),
        gpu_check.Step("left_out", (python,), 20, skipped="not installed"),
    ]
    results = [gpu_check.run_step(step, tmp_path, 100.0) for step in steps]
    results.append(gpu_check.run_step(replace(steps[0], name="late"), tmp_path, 0.0))
    assert [x.status for x in results] == ["passed", "failed", "skipped", "failed"]
    assert (tmp_path / "good.log").read_text() == "hello\n"
    shutil.copy(ROOT / "bench" / "results" / "cpu_voc.json", tmp_path / "voc.json")
    (tmp_path / "step_voc.json").write_text('{"kind": "another"}')
    gpu_check.write_summary(tmp_path, results)
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("# GPU check: failed: bad, late\n")
    assert "| left_out | skipped | 0 | not installed |" in text
    assert "| mutual_likelihood_score |" in text


def test_a_failed_step_does_not_stop_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = gpu_check.Step("good", (sys.executable, "-c", ""), 20)
    bad = gpu_check.Step("bad", (sys.executable, "-c", "1 / 0"), 20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(gpu_check._SETS, "ops", lambda out: [bad, good])
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "bad: failed exit status 1: bad.log",
        "good: passed",
        str(tmp_path / "summary.md"),
    ]
    assert "ZeroDivisionError" in (tmp_path / "bad.log").read_text()
    assert gpu_check.main(["--out", str(tmp_path), "--only", "good"]) == 0
    assert gpu_check.main(["--out", str(tmp_path), "--only", "other"]) == 2


@pytest.mark.parametrize("name", ["ops", "step"])
def test_every_step_of_the_check_runs_a_module_that_exists(tmp_path: Path, name: str) -> None:
    steps = gpu_check._SETS[name](tmp_path)
    for step in steps:
        assert step.seconds <= 300
        modules = [name for name in step.command if str(name).startswith("bench.")]
        files = [f"{name.replace('.', '/')}.py" for name in modules]
        files += [name for name in step.command if str(name).startswith("tests/")]
        assert all((ROOT / file).is_file() for file in files)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
