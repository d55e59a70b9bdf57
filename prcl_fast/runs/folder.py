"""The folder of a run: who may write into it, and where things lie."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prcl_fast.config import NEUTRAL_KEYS, Config, config_fingerprint, dump_config, load_config
from prcl_fast.errors import InputError
from prcl_fast.files.writing import user_cache, write_whole


def claim_output(config: Config) -> Path:
    """Makes the output folder of a run and writes its config.yaml; a run may take its own folder again.

    Raises:
        InputError: the folder cannot be written, or holds the run of another configuration.
    """
    folder = config.output
    fingerprint = config_fingerprint(config)
    former = folder / "config.yaml"
    try:
        if former.exists() and config_fingerprint(load_config(former)) != fingerprint:
            raise InputError(f"output: {folder} holds another configuration's run (config.yaml differs)")
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(former, yaml.safe_dump(dump_config(config), sort_keys=False).encode())
    except OSError as error:
        raise InputError(f"output: {folder} cannot be written: {error.strerror or error}") from None
    return folder


def label_scan_cache() -> Path:
    """The file that remembers which label files were checked, shared by all runs of a user."""
    return user_cache() / "label_scan.json"


def settings(config: Config) -> dict[str, Any]:
    """key.path: value, paths absolute, for all that shapes the run's result."""
    flat: dict[str, Any] = {}

    def walk(tree: Mapping[str, Any], above: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict) and key != "label_map":
                walk(value, f"{above}{key}.")
            elif above + key not in NEUTRAL_KEYS:
                flat[above + key] = value

    walk(dump_config(config), "")
    return flat


def first_difference(former: Config, now: Config) -> str:
    """The first setting in which two configurations differ, in words; "" where all are the same."""
    there, here = settings(former), settings(now)
    for key in [*here, *there]:
        if there.get(key) != here.get(key):
            return f"{key} is {there.get(key, 'not set')} there and {here.get(key, 'not set')} here"
    return ""


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
