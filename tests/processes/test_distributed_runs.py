"""Runs on several ranks: stops, kills, restarts and input errors."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch import Tensor

from bench.scaling import same_processes
from prcl_fast.config import parse_config
from prcl_fast.data.sources import build_source
from prcl_fast.engine.evaluate import evaluate
from prcl_fast.engine.resume import AllowedChanges
from prcl_fast.engine.trainer import InterruptedRunError, Trainer
from prcl_fast.errors import InputError
from prcl_fast.files.locking import FolderLock
from prcl_fast.processes.output import locked_output
from prcl_fast.runs.checkpoint import load_checkpoint, load_run
from support.processes import Pair, launch
from support.stub_networks import small_backbones
from support.tiny import shared_tree

CPU = torch.device("cpu")
QUIET = Console(quiet=True)


def _run(rank: int, config: dict[str, Any], stop_on: int | None, extend: bool = False) -> dict[str, Any]:
    with small_backbones():
        trainer = Trainer(parse_config(config, "tiny"), QUIET, allowed=AllowedChanges(extend=extend))
    start = trainer.iteration
    trainer.stop.asked = rank == stop_on
    try:
        return trainer.run() | {"start": start}
    except InterruptedRunError as error:
        return {"stopped": str(error), "start": start}


def _weights(output: Path) -> dict[str, Tensor]:
    state = load_checkpoint(output / "last.pt")
    momentum = state["optimizer"]["state"]
    return state["method"] | {f"momentum {i}": entry["momentum_buffer"] for i, entry in momentum.items()}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_stop_on_one_process_stops_all_and_any_number_of_processes_goes_on(
    two: Pair, tmp_path: Path
) -> None:
    whole, halves, alone = (
        shared_tree(tmp_path / name, iterations=4) for name in ("whole", "halves", "alone")
    )
    for config in (whole, halves, alone):
        config["data"]["crop"] = [32, 32]
    summaries = two(_run, whole, None)
    assert summaries[0]["miou"] == summaries[1]["miou"]
    for result in two(_run, halves, 1):
        assert "stopped at iteration 2 of 4" in result["stopped"]  # it is known a step later
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "last.pt").write_bytes((tmp_path / "halves" / "last.pt").read_bytes())
    assert [result["start"] for result in two(_run, halves, None)] == [2, 2]
    assert _same(_weights(tmp_path / "whole"), _weights(tmp_path / "halves"))

    assert _run(0, alone, None)["start"] == 2
    # The same batches, and the same losses but for rounding and the draws of anchors and negatives.
    together = _weights(tmp_path / "whole")
    for name, value in _weights(tmp_path / "alone").items():
        if name.startswith("student") and value.is_floating_point():
            apart = (value - together[name]).abs().max()
            assert apart < 0.1 * value.abs().max() + 0.1, name
    found = two(_evaluate, str(tmp_path / "whole"))
    network = _evaluate(0, str(tmp_path / "whole"))
    assert torch.equal(found[0], network)
    assert torch.equal(found[1], network)


def test_an_extension_that_is_interrupted_ends_as_one_that_is_not(two: Pair, tmp_path: Path) -> None:
    whole, halves = (_small_tree(tmp_path / name, iterations=2) for name in ("whole", "halves"))
    two(_run, whole, None)
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    for config in (whole, halves):
        config["train"]["iterations"] = 5
    assert [result["start"] for result in two(_run, whole, None, True)] == [2, 2]
    for result in two(_run, halves, 1, True):
        assert "stopped at iteration 4 of 5" in result["stopped"]
    assert [result["start"] for result in two(_run, halves, None, True)] == [4, 4]
    assert _same(_weights(tmp_path / "whole"), _weights(tmp_path / "halves"))


def _evaluate(rank: int, run: str) -> Tensor:
    with small_backbones():
        loaded = load_run(Path(run) / "last.pt", CPU)
    source = build_source(loaded.config.data)
    results = evaluate(loaded.networks, source, loaded.config.data, loaded.config.eval, CPU)
    found = [torch.from_numpy(result.confusion).flatten() for result in results.values()]
    uncertainty = [result.uncertainty for result in results.values()]
    assert None not in uncertainty
    for one in (part for both in uncertainty if both for part in (both.variance, both.confidence)):
        found.append(torch.from_numpy(one.histogram).flatten())
    return torch.cat(found)


def test_losses_prototypes_and_evaluation_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    config = shared_tree(tmp_path / "run", batch_labeled=4, batch_unlabeled=4)
    config["data"] |= {"crop": [32, 32]}
    config["method"] |= {"lambda_c": 0.0, "delta_u": 0.2}
    one, other = (same_processes.trained(parse_config(config, "tiny"), n, 2) for n in (1, 2))
    found = same_processes.compared(one, other)
    assert found["losses"] < 1e-6
    assert found["prototypes"] < 1e-6
    assert found["same_counts"]
    assert one["losses"].isfinite().all()
    assert one["losses"][0, 2] > 0  # L_u
    other["losses"][1, 1] *= 1.01
    assert same_processes.compared(one, other)["losses"] > same_processes.BOUND


def test_a_captured_graph_and_an_indivisible_batch_are_refused(two: Pair, tmp_path: Path) -> None:
    for line in two(_refused, shared_tree(tmp_path / "run", batch_labeled=3)):
        assert line == "train.batch_labeled: 3 is not a multiple of 2 processes x train.accumulate 1"


def _refused(rank: int, config: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        Trainer(parse_config(config, "tiny"), QUIET).run()
    return str(caught.value)


def test_an_error_in_the_configuration_is_printed_once(tmp_path: Path) -> None:
    config = shared_tree(tmp_path / "run")
    config["method"]["tua"] = 1
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(config))
    ended = [
        (*process.communicate(timeout=90), process.returncode)
        for process in launch("train", str(tmp_path / "wrong.yaml"))
    ]
    said = [line for _, error, _ in ended for line in error.splitlines()]
    assert len(said) == 1, said
    assert "unknown key method.tua; did you mean tau?" in said[0]
    assert [status for *_, status in ended] == [2, 2]
    assert not (tmp_path / "run").exists()


def test_a_difference_of_the_configurations_is_printed_by_each_rank_before_anything_is_written(
    tmp_path: Path,
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(shared_tree(tmp_path / "run")))
    ended = [
        (process.communicate(timeout=90)[1].splitlines(), process.returncode)
        for process in launch("train", str(file), last=["data.crop=[32,32]", "train.threads=2"])
    ]
    line = (
        "prcl: process 1 has data.crop [32, 32], process 0 has [64, 64]; it must be the same in all "
        "processes of a run"
    )
    assert ended == [([line], 2), ([line], 2)]
    assert not (tmp_path / "run").exists()


def test_all_ranks_end_with_the_line_about_the_process_that_holds_the_output(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(shared_tree(tmp_path / "run")))
    (tmp_path / "run").mkdir()
    lock = FolderLock(tmp_path / "run", "output")
    before = sorted((tmp_path / "run").iterdir())
    processes = launch("train", str(tmp_path / "run.yaml"))
    ended = [process.communicate(timeout=90) for process in processes]
    said = [line for _, error in ended for line in error.splitlines()]
    assert len(said) == 1, said
    assert f"run is in use by process {os.getpid()} on " in said[0]
    assert [process.returncode for process in processes] in ([2, 1], [1, 2], [2, 2])
    assert sorted((tmp_path / "run").iterdir()) == before
    lock.release()


def _locked(rank: int, folder: Path) -> str:
    with pytest.raises(InputError) as caught, locked_output(folder / "file", "output"):
        pass
    return str(caught.value)


def test_no_rank_goes_on_where_rank_0_has_no_lock(two: Pair, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert two(_locked, tmp_path) == [f"output: {tmp_path / 'file'} is not a folder"] * 2


def test_sigterm_to_every_rank_saves_and_prints_once(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(_small_tree(tmp_path / "run", iterations=500, eval_every=500)))
    processes = launch("train", str(file))
    _await_file(tmp_path / "run" / "last.pt", processes[0])
    for process in processes:
        process.send_signal(signal.SIGTERM)
    ended = [process.communicate(timeout=60) for process in processes]
    said = [line for _, error in ended for line in error.splitlines() if line.startswith("prcl: stopped")]
    assert len(said) == 1, ended
    assert "the same command goes on from there" in said[0]
    assert [process.returncode for process in processes] == [1, 1]
    assert load_checkpoint(tmp_path / "run" / "last.pt")["iteration"] < 500


@pytest.mark.slow
def test_torchrun_restarts_all_ranks_after_a_kill_and_the_run_completes(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(_small_tree(tmp_path / "run", iterations=6, eval_every=6)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "-m", "prcl_fast.cli.main", "train", str(file)]
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _await_file(tmp_path / "run" / "last.pt", run)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        out, error = run.communicate(timeout=150)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 0, error
    assert json.loads(out.splitlines()[-1])["iterations"] == 6
    assert "going on from iteration" in error


def _small_tree(output: Path, **train: int) -> dict[str, Any]:
    """A run on small crops that is saved after every step."""
    config = shared_tree(output, save_every=1, **train)
    config["data"]["crop"] = [32, 32]
    return config


def _await_file(path: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")
