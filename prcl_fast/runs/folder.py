"""The folder of a run: claimed by one configuration, and the state of the run in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prcl_fast.config import NEUTRAL_KEYS, Config, dump_config, flat_config, load_stored_config
from prcl_fast.console.text import excerpts, value_text
from prcl_fast.errors import InputError
from prcl_fast.files.folders import check_subfolder
from prcl_fast.files.writing import make_folder, remove_leftovers, user_cache, write_text
from prcl_fast.runs.metrics import METRICS, newest_records

CONFIGURATION = "config.yaml"
EXTENDABLE = "train.iterations"  # the key that may grow in a run that exists


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


def check_output(config: Config, *, extend: bool = False) -> None:
    """Compares a configuration with the run in its output folder, if one is there.

    Args:
        extend: that run may have fewer `train.iterations`.

    Raises:
        InputError: the run cannot go on as `config`, or there is nothing to extend.
    """
    former = _stored_config(config.output)
    if former is not None:
        check_same_run(former, config, extend=extend)
    if extend:
        _check_extension(former, config)


def claim_output(config: Config, *, extend: bool = False) -> Path:
    """Makes the output folder of a run; a run may take its own folder again.

    Temporary files that a killed process of the run left there are removed. `store_config` then writes
    config.yaml, once the run's checkpoint is compared as well.

    Raises:
        InputError: the folder cannot be written, or has a link in place of a folder of its own; or what
            `check_output` refuses.
    """
    folder = config.output
    check_output(config, extend=extend)
    make_folder(folder, "output")
    for name in ("tensorboard", "figures"):
        check_subfolder(folder / name)
    remove_leftovers(folder)
    return folder


def store_config(config: Config) -> Path:
    """Writes config.yaml into the run's folder, and returns its path. Raises WriteError."""
    path = config.output / CONFIGURATION
    write_text(path, yaml.safe_dump(dump_config(config), sort_keys=False), durable=True)
    return path


def run_state(config: Config) -> RunState:
    """The state of the run in the folder of `config`.

    Raises:
        InputError: the folder holds the run of another configuration.
    """
    folder, total = config.output, config.train.iterations
    check_output(config)
    records = newest_records(folder / METRICS)
    done = any(record["kind"] == "eval" and record["iteration"] == total for record in records)
    started = 0 if (folder / METRICS).exists() else None
    return RunState(records[0]["iteration"] if records else started, total, done)


def check_same_run(former: Config, now: Config, *, extend: bool = False) -> None:
    """Compares a configuration with that of the run in its folder.

    Args:
        extend: more `train.iterations` are allowed.

    Raises:
        InputError: they differ; the message names the keys with both values, and what the user can do.
    """
    there, here = settings(former), settings(now)
    keys = [key for key in dict.fromkeys([*here, *there]) if there.get(key) != here.get(key)]
    longer = keys == [EXTENDABLE] and here[EXTENDABLE] > there[EXTENDABLE]
    if not keys or (longer and extend):
        return
    named = ", ".join(_difference(there, here, key) for key in keys[:3])
    more = f" ({len(keys)} keys differ)" if len(keys) > 3 else ""
    if longer:
        remedy = (
            f"prcl train --extend trains it on to {here[EXTENDABLE]} iterations; or choose another output"
        )
    elif extend and keys != [EXTENDABLE]:
        remedy = f"--extend changes {EXTENDABLE} alone; restore the others or choose another output"
    elif keys == [EXTENDABLE]:
        remedy = "a run cannot get shorter; move it away or choose another output"
    else:
        remedy = "restore them, move the run away or choose another output"
    raise InputError(f"output: {now.output} holds another configuration's run: {named}{more}; {remedy}")


def _check_extension(former: Config | None, config: Config) -> None:
    """Raises InputError where --extend has no run to extend, or one that has done all of its iterations."""
    if former is None and not os.path.exists(config.output / METRICS):
        raise InputError(f"--extend: {config.output} holds no run; leave --extend out to begin one")
    if former is not None and former.train.iterations == config.train.iterations and run_state(config).done:
        raise InputError(
            f"--extend: the run in {config.output} has done its {config.train.iterations} iterations; set a "
            f"larger {EXTENDABLE}"
        )


def newest_iteration(config: Config) -> int:
    """Iterations behind the newest record of a run, 0 without one."""
    records = newest_records(config.output / METRICS)
    return records[0]["iteration"] if records else 0


def settings(config: Config) -> dict[str, Any]:
    """key.path: value, paths absolute, of every key that shapes the run's result."""
    return flat_config(config, NEUTRAL_KEYS)


def _stored_config(folder: Path) -> Config | None:
    """The configuration of the run in `folder`; None where no run has claimed it. Raises InputError."""
    path = folder / CONFIGURATION
    return load_stored_config(path) if os.path.exists(path) else None


def _difference(there: Mapping[str, Any], here: Mapping[str, Any], key: str) -> str:
    texts = (value_text(values[key]) if key in values else "not set" for values in (there, here))
    former, now = excerpts(*texts)
    return f"{key} is {former} there and {now} here"


def label_scan_cache() -> Path | None:
    """The file that lists the label files already checked, shared by all runs of a user with a home."""
    folder = user_cache()
    return None if folder is None else folder / "label_scan.json"
