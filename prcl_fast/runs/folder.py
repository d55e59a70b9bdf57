"""The folder of a run: claimed by one configuration, and the state of the run in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prcl_fast.config import NEUTRAL_KEYS, Config, config_fingerprint, dump_config, load_stored_config
from prcl_fast.errors import InputError
from prcl_fast.files.writing import make_folder, remove_leftovers, user_cache, write_text
from prcl_fast.runs.metrics import METRICS, newest_records


@dataclass(frozen=True)
class RunState:
    """Progress of a run, by its metrics.

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


def claim_output(config: Config) -> Path:
    """Makes the output folder of a run and writes its config.yaml; a run may take its own folder again.

    Temporary files that a killed process of the run left there are removed.

    Raises:
        InputError: the folder cannot be written, or holds the run of another configuration.
    """
    folder, fingerprint = config.output, config_fingerprint(config)
    former = folder / "config.yaml"
    if os.path.exists(former) and config_fingerprint(load_stored_config(former)) != fingerprint:
        raise InputError(f"output: {folder} holds another configuration's run (config.yaml differs)")
    make_folder(folder, "output")
    remove_leftovers(folder)
    write_text(former, yaml.safe_dump(dump_config(config), sort_keys=False), durable=True)
    return folder


def run_state(config: Config) -> RunState:
    """The state of the run in the folder of `config`.

    Raises:
        InputError: the folder holds the run of another configuration.
    """
    folder, total = config.output, config.train.iterations
    former = folder / "config.yaml"
    if former.exists():
        before = load_stored_config(former)
        if config_fingerprint(before) != config_fingerprint(config):
            raise InputError(
                f"{folder} holds another configuration's run: {first_difference(before, config)}; "
                "move it away or choose another output"
            )
    records = newest_records(folder / METRICS)
    done = any(record["kind"] == "eval" and record["iteration"] == total for record in records)
    started = 0 if (folder / METRICS).exists() else None
    return RunState(records[0]["iteration"] if records else started, total, done)


def newest_iteration(config: Config) -> int:
    """Iterations behind the newest record of a run, 0 without one."""
    records = newest_records(config.output / METRICS)
    return records[0]["iteration"] if records else 0


def first_difference(former: Config, now: Config) -> str:
    """The first setting in which two configurations differ, in words; "" where all are equal."""
    there, here = settings(former), settings(now)
    for key in [*here, *there]:
        if there.get(key) != here.get(key):
            return f"{key} is {there.get(key, 'not set')} there and {here.get(key, 'not set')} here"
    return ""


def settings(config: Config) -> dict[str, Any]:
    """key.path: value, paths absolute, of every key that shapes the run's result."""
    flat: dict[str, Any] = {}

    def walk(tree: Mapping[str, Any], above: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict) and key != "label_map":
                walk(value, f"{above}{key}.")
            elif above + key not in NEUTRAL_KEYS:
                flat[above + key] = value

    walk(dump_config(config), "")
    return flat


def label_scan_cache() -> Path | None:
    """The file that lists the label files already checked, shared by all runs of a user with a home."""
    folder = user_cache()
    return None if folder is None else folder / "label_scan.json"
