"""Repeated kills of a training on two ranks, whose final state is compared with an undisturbed training.

python tests/support/kill_often.py [--kills 100] [--seed 0] [--steps 300] [--folder DIR] [--json FILE]

After a random wait, one or both ranks get SIGKILL; a rank that is left must end by itself. All checkpoints
must then be undamaged, and the next start resumes. Exit status 1 unless the final weights, momentum and
prototypes are bitwise equal. In a folder of an earlier call, the script goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from prcl_fast.runs.checkpoint import last_checkpoints, load_checkpoint
from support.processes import launch
from support.tiny import tiny_tree

KILLS, ALONE, READ = "kills", "of one process alone", "checkpoints read"
LONGEST = "longest until the other ended, s"
_START = 120.0  # seconds that a start may take until the run goes on
_END = 60.0  # seconds within which a process must end when the other is gone


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="prcl_kills_") as temporary:
        result = kill_often(options.folder or Path(temporary), options.kills, options.steps, options.seed)
    print(json.dumps(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(not (result["equal"] and result[KILLS] == options.kills))


def kill_often(folder: Path, kills: int, steps: int, seed: int) -> dict[str, object]:
    """Trains once undisturbed and once with kills; the counts, and whether both final states are equal."""
    folder.mkdir(parents=True, exist_ok=True)
    configs = {name: _config(folder, name, steps) for name in ("whole", "killed")}
    _finish(configs["whole"])
    output, notes = folder / "killed", folder / "kills.json"
    count = {KILLS: 0, ALONE: 0, LONGEST: 0.0, READ: 0}
    if notes.exists():
        count = json.loads(notes.read_text())
    draw = random.Random(f"{seed} {count[KILLS]}")
    while count[KILLS] < kills:
        processes = launch("train", str(configs["killed"]))
        started = _wait(processes, output, draw)
        if any(process.poll() is not None for process in processes):
            errors = [_stopped(process) for process in processes]
            if all(process.returncode == 0 for process in processes):
                break  # the run is over before all kills were made
            raise SystemExit(f"ended by itself: {errors}")
        # Before the rendezvous, a rank would wait minutes for one that may only be late.
        victims = draw.choice((processes, processes, processes[:1], processes[1:])) if started else processes
        for process in victims:
            os.killpg(process.pid, signal.SIGKILL)
        count[KILLS] += 1
        if len(victims) == 1:
            count[ALONE] += 1
            killed_at = time.monotonic()
            for process in processes:
                process.communicate(timeout=_END)
            count[LONGEST] = max(round(time.monotonic() - killed_at, 1), count[LONGEST])
        for process in processes:
            _stopped(process)
        for path in last_checkpoints(output):
            load_checkpoint(path)  # raises where it is not whole
            count[READ] += 1
        notes.write_text(json.dumps(count))
        newest = [load_checkpoint(path)["iteration"] for path in last_checkpoints(output)[:1]]
        print(
            f"kill {count[KILLS]}: {len(victims)} killed; state of iteration {newest}",
            file=sys.stderr,
            flush=True,
        )
    _finish(configs["killed"])
    return {
        **count,
        "steps": steps,
        "seed": seed,
        "equal": _equal(folder / "whole" / "last.pt", output / "last.pt"),
    }


def _config(folder: Path, name: str, steps: int) -> Path:
    tree = tiny_tree(folder / name)
    tree["train"] |= {
        "iterations": steps,
        "batch_labeled": 4,
        "batch_unlabeled": 4,
        "eval_every": max(1, steps // 3),
        "save_every": 2,
    }
    tree["data"]["crop"] = [32, 32]
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def _finish(config: Path) -> None:
    for process in launch("train", str(config)):
        _, error = process.communicate()
        if process.returncode != 0:
            raise SystemExit(f"the run failed: {error}")


def _wait(processes: list[subprocess.Popen[str]], output: Path, draw: random.Random) -> bool:
    """Waits until a random moment: mostly after the run went on (True), at times while it starts."""
    if draw.random() < 0.2:
        time.sleep(8 * draw.random())
        return False
    before = _saved_at(output)
    deadline = time.monotonic() + _START
    while _saved_at(output) == before and time.monotonic() < deadline:
        if any(process.poll() is not None for process in processes):
            return False
        time.sleep(0.01)
    time.sleep(1.5 * draw.random())
    return True


def _saved_at(output: Path) -> int:
    try:
        return (output / "last.pt").stat().st_mtime_ns
    except FileNotFoundError:  # or a new one takes its name at this moment
        return 0


def _stopped(process: subprocess.Popen[str]) -> str:
    """Ends a process and its workers; its standard error."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return "" if process.stderr is None or process.stderr.closed else process.communicate()[1]


def _equal(one: Path, other: Path) -> bool:
    a, b = load_checkpoint(one), load_checkpoint(other)
    same = a["iteration"] == b["iteration"] and a["method"].keys() == b["method"].keys()
    momentum = [x["optimizer"]["state"] for x in (a, b)]
    return (
        same
        and all(torch.equal(a["method"][name], b["method"][name]) for name in a["method"])
        and momentum[0].keys() == momentum[1].keys()
        and all(
            torch.equal(momentum[0][key]["momentum_buffer"], momentum[1][key]["momentum_buffer"])
            for key in momentum[0]
        )
    )


if __name__ == "__main__":
    sys.exit(main())
