"""Checkpoints of a run: best.pt, last.pt and its predecessors last-1.pt, last-2.pt, ..., newest first."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prcl_fast.config import Config, parse_config
from prcl_fast.errors import InputError, RunError
from prcl_fast.files.writing import TEMPORARY, cannot_write, staged, write_whole
from prcl_fast.methods import Method, build_method
from prcl_fast.runs import checkpoint_file
from prcl_fast.runs.checkpoint_file import DamagedCheckpointError, check_state


@dataclass(frozen=True)
class LoadedRun:
    """What a checkpoint holds for evaluation and prediction."""

    path: Path
    config: Config
    classes: tuple[str, ...]
    palette: np.ndarray  # uint8 [C, 3]
    iteration: int
    networks: dict[str, nn.Module]  # in eval mode; the first is the one that counts


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` so that `path` holds either the former or the new checkpoint, whatever happens.

    Raises:
        RunError: it cannot be written; the line says which whole checkpoint there is instead.
    """
    try:
        write_whole(path, checkpoint_file.pack(state))
    except OSError as error:
        raise _not_saved(path, error) from None


def save_last(folder: Path, state: dict[str, Any], keep: int) -> None:
    """Writes folder/last.pt and keeps the former ones as last-1.pt, last-2.pt, ...: `keep` >= 1 in all.

    Whenever the process ends, one of these files is whole and at most one save old. One process may save.

    Raises:
        RunError: it cannot be written; the line says which whole checkpoint there is instead.
    """
    last = folder / "last.pt"
    try:
        (folder / f"best.pt{TEMPORARY}").unlink(missing_ok=True)  # of a run that was killed
        with staged(last, checkpoint_file.pack(state)):
            free_last(folder, keep)
        remove_older(folder, keep)
    except OSError as error:
        raise _not_saved(last, error) from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that was saved in the file `path`, on the CPU.

    Raises:
        InputError: missing, damaged, or not one of our checkpoints.
    """
    state = checkpoint_file.read(path)
    check_state(state, path)
    return state


def newest_checkpoint(folder: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole one of last.pt, last-1.pt, ... and its state; None where there is none of them.

    `say` is told of each damaged one. It is renamed to NAME.damaged, so that it takes no part in
    `save_last`; where none is whole, all are left as they are. One process of a run may call this.

    Raises:
        InputError: none is whole, or the newest is another program's or version's.
        RunError: a damaged one cannot be renamed.
    """
    found, damaged = _newest_whole(folder)
    if found is None:
        if damaged:
            raise InputError("; ".join(damaged.values()))
        return None
    path, state = found
    for spoilt, reason in damaged.items():
        say(f"{reason}; {path.name} of iteration {state['iteration']} is used instead")
        try:
            os.replace(spoilt, spoilt.with_name(spoilt.name + ".damaged"))
        except OSError as error:
            raise RunError(f"{spoilt}: cannot be renamed: {error.strerror or error}") from None
    return found


def find_checkpoint(path: Path) -> Path:
    """A checkpoint file itself, or a run folder's best.pt, else its newest last one. Raises InputError."""
    if path.is_dir():
        found = _checkpoints(path)
        if not found:
            raise InputError(f"{path}: no best.pt or last.pt in this folder")
        return found[0]
    if not path.exists():
        raise InputError(f"{path}: no such run or checkpoint")
    return path


def load_run(path: Path, device: torch.device) -> LoadedRun:
    """The networks of a run folder or checkpoint file, ready to evaluate on `device`. Raises InputError."""
    file = find_checkpoint(path)
    try:
        state = load_checkpoint(file)
    except DamagedCheckpointError as error:
        others = [other.name for other in _checkpoints(file.parent) if other.name != file.name]
        beside = f"; beside it: {', '.join(others)}" if others else "; no other checkpoint is beside it"
        raise InputError(f"{error}{beside}") from None
    config = parse_config(state["config"], str(file))
    # The checkpoint holds every weight: a file of initial ones may be long gone.
    config = config.model_copy(update={"model": config.model.model_copy(update={"weights": None})})
    classes = tuple(state["classes"])
    method = build_method(config, len(classes))
    restore(method, state["method"], file)
    method.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    networks = {name: network.eval() for name, network in method.networks().items()}
    palette = np.asarray(state["palette"], dtype=np.uint8)
    return LoadedRun(file, config, classes, palette, state["iteration"], networks)


def restore(method: Method, state: dict[str, Any], origin: Path) -> None:
    """Loads a method's state strictly. Raises InputError naming `origin`."""
    try:
        method.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{origin}: does not fit this configuration: {reason}") from None


def _newest_whole(folder: Path) -> tuple[tuple[Path, dict[str, Any]] | None, dict[Path, str]]:
    """The newest whole one of the last checkpoints, and what is wrong with each newer one."""
    damaged: dict[Path, str] = {}
    for path in _last(folder):
        try:
            return (path, load_checkpoint(path)), damaged
        except DamagedCheckpointError as error:
            damaged[path] = str(error)
    return None, damaged


def _checkpoints(folder: Path) -> list[Path]:
    best = folder / "best.pt"
    return [best, *_last(folder)] if best.is_file() else _last(folder)


def _last(folder: Path) -> list[Path]:
    try:
        return last_checkpoints(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror or error}") from None


def _not_saved(path: Path, error: OSError) -> RunError:
    """What went wrong, and what the run can go on from."""
    rest = "no whole last.pt is beside it"
    with contextlib.suppress(InputError):
        found, _ = _newest_whole(path.parent)
        if found is not None:
            rest = f"{found[0].name} of iteration {found[1]['iteration']} is whole"
    return RunError(f"{cannot_write(path, error)}; {rest}")


def last_checkpoints(folder: Path) -> list[Path]:
    """last.pt, last-1.pt, ..., newest first, as far as they are there. Raises OSError."""
    paths = [folder / name for name in os.listdir(folder)]
    return sorted((path for path in paths if _age(path) >= 0), key=_age)


def free_last(folder: Path, keep: int) -> None:
    """Frees the name last.pt: each takes the next older name, up to the first free one. Raises OSError.

    The oldest of `keep` gives way only where all names are taken, and at every moment the others are there.
    """
    present = {_age(path) for path in last_checkpoints(folder)}
    free = next(age for age in range(keep) if age not in present or age == keep - 1)
    for age in range(free, 0, -1):
        os.replace(folder / _name(age - 1), folder / _name(age))


def remove_older(folder: Path, keep: int) -> None:
    """Removes what is older than `keep` checkpoints, as after a run that kept more. Raises OSError."""
    for path in last_checkpoints(folder):
        if _age(path) >= keep:
            path.unlink()


def _age(path: Path) -> int:
    """0 for last.pt, n for last-n.pt, -1 for any other file."""
    found = re.fullmatch(r"last(?:-([1-9]\d*))?\.pt", path.name)
    return int(found[1] or 0) if found else -1


def _name(age: int) -> str:
    return f"last-{age}.pt" if age else "last.pt"
