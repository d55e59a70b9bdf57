"""How far a run has come, read off its folder without its checkpoints, which are large."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prcl_fast.config import Config, config_fingerprint, load_config
from prcl_fast.engine.settings import first_difference
from prcl_fast.errors import InputError

_TAIL = 1 << 18  # bytes from the end of metrics.jsonl: some hundred records


@dataclass(frozen=True)
class RunState:
    """How far a run has come, by its metrics.

    Attributes:
        iteration: of the newest record; None where the run was never started.
        total: iterations of the whole run.
        done: whether the evaluation after the last iteration is there.
    """

    iteration: int | None
    total: int
    done: bool

    def __str__(self) -> str:
        if self.done:
            return "done"
        return "new" if self.iteration is None else f"unfinished at {self.iteration} of {self.total}"


def run_state(config: Config) -> RunState:
    """The state of a run's folder.

    Raises:
        InputError: the folder holds the run of another configuration.
    """
    folder, total = config.output, config.train.iterations
    former = folder / "config.yaml"
    if former.exists():
        before = load_config(former)
        if config_fingerprint(before) != config_fingerprint(config):
            raise InputError(
                f"{folder} holds another configuration's run: {first_difference(before, config)}; "
                "move it away or choose another output"
            )
    records = _newest_records(folder / "metrics.jsonl")
    done = any(kind == "eval" and iteration == total for kind, iteration in records)
    started = bool(records) or (folder / "metrics.jsonl").exists()
    return RunState(records[0][1] if records else 0 if started else None, total, done)


def newest_iteration(config: Config) -> int:
    """Iterations behind the newest record of a run, 0 without one."""
    records = _newest_records(config.output / "metrics.jsonl")
    return records[0][1] if records else 0


def _newest_records(path: Path) -> list[tuple[Any, int]]:
    """Kind and iteration of the last records, newest first; a line that is being written is passed over."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    records = []
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line
            record = json.loads(line)
            if type(record["iteration"]) is int:
                records.append((record["kind"], record["iteration"]))
    return records
