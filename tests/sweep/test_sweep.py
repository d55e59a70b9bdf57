"""`prcl sweep`: checks before the first run; starting, stopping and resuming runs."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
import yaml

from prcl_fast.cli.sweep import sweep_command
from prcl_fast.data.sources.synthetic import SyntheticSource
from prcl_fast.errors import InputError
from prcl_fast.runs.folder import run_state
from prcl_fast.sweep.config import read_sweep
from prcl_fast.sweep.run import Ended, Started, Working, gpu_names, places, train_runs
from support.made_up_runs import finish, write_lines, write_made_up_run, write_sweep


def test_a_wrong_key_in_the_last_run_ends_the_command_before_anything_is_written(tmp_path):
    axes = {"m": {"a": {}, "b": {"set": {"method.tua": 1.0}}}}
    with pytest.raises(InputError, match=r"run b/seed_0: unknown key method.tua; did you mean tau?"):
        sweep_command(write_sweep(tmp_path, axes=axes))
    assert not (tmp_path / "out").exists()


def test_a_missing_file_of_any_run_is_named_before_the_first_one_starts(tmp_path):
    axes = {"m": {"a": {}, "b": {"set": {"model.weights": "none.pth"}}}}
    with pytest.raises(InputError, match=r"run b/seed_0: model.weights: no such file or folder: .*none.pth"):
        sweep_command(write_sweep(tmp_path, axes=axes))
    assert not (tmp_path / "out").exists()


def test_the_state_of_a_run_is_read_off_its_folder(tmp_path):
    new, half, spoilt, done = (run.config for run in read_sweep(write_sweep(tmp_path)).runs[:4])
    write_made_up_run(half, {3: 10.0}, until=4)
    lines = (write_made_up_run(spoilt, {3: 10.0}) / "metrics.jsonl").read_text().splitlines()
    write_lines(spoilt.output, [*lines, '{"kind": "eval", "itera'])
    write_made_up_run(done, {3: 10.0, 6: 20.0})
    states = [str(run_state(config)) for config in (new, half, spoilt, done)]
    assert states == ["new", "unfinished at 4 of 6", "unfinished at 3 of 6", "done"]


def test_a_finished_run_of_another_configuration_is_named_with_the_difference(tmp_path):
    path = write_sweep(tmp_path)
    finish(read_sweep(path))
    with pytest.raises(InputError) as caught:
        sweep_command(path, ["optim.lr=0.125"])
    folder = tmp_path / "out/supervised/2/seed_0"
    assert str(caught.value).startswith(
        f"output: {folder} holds another configuration's run: optim.lr is 0.0064 there and 0.125 here"
    )


def test_runs_may_not_lie_inside_another_run(tmp_path):
    path = write_sweep(tmp_path)
    write_made_up_run(read_sweep(path).runs[0].config, {6: 1.0})
    inside = tmp_path / "out/supervised/2/seed_0/more"
    with pytest.raises(InputError, match=r"output: .*more would put runs inside the run folder .*seed_0"):
        sweep_command(path, [f"output={inside}"], dry_run=True)


def test_a_dry_run_lists_the_chosen_runs_and_writes_nothing(tmp_path, capsys):
    path = write_sweep(tmp_path)
    write_made_up_run(read_sweep(path).runs[0].config, {6: 1.0})
    before = sorted(tmp_path.rglob("*"))
    sweep_command(path, only=["supervised/*", "*/4/seed_1"], dry_run=True)
    out = capsys.readouterr().out
    assert out.splitlines()[0] == f"5 runs in {tmp_path / 'out'}"
    assert [line.split()[3] for line in out.splitlines() if "seed_" in line] == ["done", *["new"] * 4]
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(InputError, match="--only: 'prcl/\\*' matches no run; one is supervised/2/seed_0"):
        sweep_command(path, only=["prcl/*"], dry_run=True)


def test_each_gpu_is_a_place_and_the_cpu_has_as_many_as_asked(tmp_path, monkeypatch):
    runs = read_sweep(write_sweep(tmp_path)).runs
    assert places(runs, None, {}) == [{}]
    assert places(runs, 2, {"OMP_NUM_THREADS": "3"}) == [{"OMP_NUM_THREADS": "3"}] * 2
    assert int(places(runs, 1000, {})[0]["OMP_NUM_THREADS"]) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert places(runs, None, {}) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    assert places(runs, 1, {"CUDA_VISIBLE_DEVICES": "5,7"}) == [{"CUDA_VISIBLE_DEVICES": "5"}]
    with pytest.raises(InputError, match="--jobs: 3, but 2 GPUs are visible"):
        places(runs, 3, {})
    with pytest.raises(InputError, match=r"train.device: cuda:1: a sweep assigns one GPU to each run"):
        places(read_sweep(write_sweep(tmp_path), ["train.device=cuda:1"]).runs, None, {})
    assert gpu_names("GPU-a, GPU-b", 1) == ["GPU-a"]


STAND_IN = """#!/bin/sh
# Called as: python -m prcl_fast.cli.main train FILE
folder=$(dirname "$4")
echo "$RANK,$PLACE" > "$folder/environment"
case "$4" in
  */out/fails/*) echo first; echo "prcl: data.root: no such folder" >&2; exit 2 ;;
  */out/waits/*) trap 'echo saved > "$folder/saved"; exit 1' INT TERM
    : > "$folder/waiting"; while :; do sleep 0.05; done ;;
  */out/slow*) sleep 0.5 ;;
  */out/killed/*) kill -KILL $$ ;;
esac
printf '{"kind": "train", "iteration": 6, "seconds": 90}\\n' > "$folder/metrics.jsonl"
printf '{"kind": "eval", "iteration": 6, "miou": 50.0, "miou_student": 40.0}\\n' >> "$folder/metrics.jsonl"
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Replaces training: slow, failing, waiting for a signal or killed, by the run's name."""
    script = tmp_path / "python"
    script.write_text(STAND_IN)
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))

    def sweep(*names: str) -> Path:
        return write_sweep(tmp_path, axes={"run": {name: {} for name in names}}, seeds=[0])

    return sweep


def test_labels_that_training_would_refuse_stop_the_sweep_before_its_first_run(
    stand_in, tmp_path, monkeypatch
):
    read = SyntheticSource.label
    monkeypatch.setattr(SyntheticSource, "label", lambda source, name: np.full_like(read(source, name), 255))
    with pytest.raises(
        InputError, match=r"run a/seed_0: data\.labeled: no pixel of these images has a label"
    ):
        sweep_command(stand_in("a", "z"))
    assert not (tmp_path / "out/a").exists()


def test_a_run_that_fails_does_not_stop_the_others_and_is_named_at_the_end(stand_in, tmp_path, capsys):
    path = stand_in("a", "fails", "killed", "z")
    with pytest.raises(typer.Exit) as caught:
        sweep_command(path)
    assert caught.value.exit_code == 1
    out, error = capsys.readouterr()
    assert json.loads(out.splitlines()[-1]) == {
        "output": str(tmp_path / "out"),
        "runs": 4,
        "done": 2,
        "failed": ["fails/seed_0", "killed/seed_0"],
        "table": str(tmp_path / "out/table.md"),
    }
    assert error.splitlines()[-2:] == [
        "prcl: run fails/seed_0 failed: data.root: no such folder",
        "prcl: run killed/seed_0 failed: ended by SIGKILL; its log is empty",
    ]
    lines = [line for line in error.splitlines() if not line.startswith("note: ")]
    assert lines[:2] == ["started a/seed_0", "done a/seed_0: mIoU 50.0, 90 s; 1 of 4 runs"]
    again = read_sweep(path).runs[0].config
    assert yaml.safe_load((again.output / "train.yaml").read_text())["output"] == str(again.output)
    assert "first\nprcl: data.root" in (tmp_path / "out/fails/seed_0/train.log").read_text()


def test_finished_runs_are_left_alone(stand_in, tmp_path, capsys):
    path = stand_in("a", "fails")
    finish(read_sweep(path))
    sweep_command(path)
    out, error = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["done"] == 2
    assert error == ""
    assert not (tmp_path / "out/a/seed_0/train.log").exists()


def test_runs_share_the_places_and_hear_nothing_of_a_launcher(stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    runs = read_sweep(stand_in("slow_a", "slow_b", "c")).runs
    most = 0
    for event in train_runs(runs, [{"PLACE": "x"}, {"PLACE": "y"}]):
        if isinstance(event, Working):
            most = max(most, len(event.runs))
    seen = [(run.config.output / "environment").read_text() for run in runs]
    assert most == 2
    assert sorted(seen[:2]) == [",x\n", ",y\n"]
    assert seen[2] in seen[:2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_runs_which_save_before_the_sweep_ends(stand_in, tmp_path, number):
    runs = read_sweep(stand_in("waits", "b")).runs
    events: list[object] = []
    for event in train_runs(runs, [{}]):
        if not isinstance(event, Working):
            events.append(event)
        elif (tmp_path / "out/waits/seed_0/waiting").exists() and number is not None:
            os.kill(os.getpid(), number)
            number = None
    assert events == [Started(runs[0]), Ended(runs[0], None)]
    assert (tmp_path / "out/waits/seed_0/saved").exists()
    assert not (tmp_path / "out/b").exists()


def test_an_error_here_stops_the_runs(stand_in, tmp_path):
    events = train_runs(read_sweep(stand_in("waits")).runs, [{}])
    while not (tmp_path / "out/waits/seed_0/waiting").exists():
        next(events)
    with pytest.raises(ZeroDivisionError):
        events.throw(ZeroDivisionError())
    assert (tmp_path / "out/waits/seed_0/saved").exists()


def test_a_run_that_another_process_trains_is_not_started_twice(stand_in, tmp_path):
    runs = read_sweep(stand_in("waits")).runs
    first = train_runs(runs, [{}])
    while not (tmp_path / "out/waits/seed_0/waiting").exists():
        next(first)
    before = (runs[0].config.output / "train.log").read_bytes()
    (ended,) = train_runs(runs, [{}])
    folder = runs[0].config.output
    assert isinstance(ended, Ended)
    assert ended.failure.startswith(f"output: {folder} is in use by process {os.getpid()} on ")
    assert (folder / "train.log").read_bytes() == before
    first.close()
    assert not (folder / ".prcl.lock").exists()


def test_a_log_that_is_a_link_or_a_pipe_fails_its_run_and_no_other(stand_in, tmp_path):
    runs = read_sweep(stand_in("linked", "piped", "c")).runs
    logs = [run.config.output / "train.log" for run in runs[:2]]
    for log in logs:
        log.parent.mkdir(parents=True)
    (tmp_path / "victim").write_text("precious")
    logs[0].symlink_to(tmp_path / "victim")
    os.mkfifo(logs[1])
    events = [event for event in train_runs(runs, [{}]) if not isinstance(event, Working)]
    assert events == [
        Ended(runs[0], f"{logs[0]}: cannot be written: it is a link"),
        Ended(runs[1], f"{logs[1]}: cannot be written: it is a pipe"),
        Started(runs[2]),
        Ended(runs[2], None),
    ]
    assert (tmp_path / "victim").read_text() == "precious"


def test_runs_of_one_configuration_are_noted(stand_in, capsys):
    sweep_command(stand_in("a", "b"))
    assert "note: run b/seed_0 has the same configuration as a/seed_0\n" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_goes_on_after_sigint_and_ends_with_its_table(tmp_path, capsys):
    path = write_sweep(tmp_path)
    overrides = ["train.iterations=16", "train.log_every=1", "train.eval_every=16"]
    sweep = read_sweep(path, overrides)
    for run in sweep.runs[1:]:
        write_made_up_run(run.config, {16: 40.0})
    command = [sys.executable, "-m", "prcl_fast.cli.main", "sweep", str(path), *overrides]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = sweep.runs[0].config.output
    deadline = time.monotonic() + 100
    while not ((first / "metrics.jsonl").exists() and (first / "metrics.jsonl").stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=100)
    assert (process.returncode, out) == (1, ""), error
    assert error.splitlines()[-1] == (
        "prcl: stopped: 1 of 8 runs are not finished; the same command resumes them"
    )
    assert (first / "last.pt").exists()

    sweep_command(path, overrides)
    out, error = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["done"] == 8
    assert "started supervised/2/seed_0, continuing after iteration" in error
    assert "going on from iteration" in (first / "train.log").read_text()
    scores = [float(line["miou"]) for line in csv.DictReader((tmp_path / "out/table.csv").open())]
    assert scores[1:] == [40.0] * 7
    assert scores[0] != 40.0
