"""Checkpoints of a run: write, find, load and rotate best.pt, last.pt, last-1.pt, last-2.pt, ..."""

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

from prcl_fast.config import Config, parse_stored_config
from prcl_fast.errors import InputError, RunError, WriteError
from prcl_fast.files.writing import replacing, sync, write_bytes, write_errors
from prcl_fast.methods import Method, build_method
from prcl_fast.models.weights import check_keys
from prcl_fast.runs import checkpoint_file
from prcl_fast.runs.checkpoint_file import DamagedCheckpointError, check_state


@dataclass(frozen=True)
class LoadedRun:
    """The contents of a checkpoint for evaluation and prediction."""

    path: Path
    config: Config
    classes: tuple[str, ...]
    palette: np.ndarray  # uint8 [C, 3]
    iteration: int
    networks: dict[str, nn.Module]  # in eval mode; the first is the main network


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Writes `state`; at every moment `path` holds the former or the new checkpoint.

    Raises:
        RunError: it cannot be written; the message names an undamaged checkpoint.
    """
    path = Path(path)
    try:
        write_bytes(path, checkpoint_file.pack(state), durable=True)
    except WriteError as error:
        raise _not_saved(path, error) from None


def save_last(folder: Path, state: dict[str, Any], keep: int) -> None:
    """Writes folder/last.pt and keeps the former ones as last-1.pt, last-2.pt, ...: `keep` >= 1 in all.

    Whenever the process is killed, one of these files is undamaged and at most one save old. Only one process
    of a run may save.

    Raises:
        RunError: it cannot be written; the message names an undamaged checkpoint.
    """
    last = folder / "last.pt"
    try:
        with replacing(last, durable=True) as file:
            file.write(checkpoint_file.pack(state))
            sync(file)  # before the former ones change their names
            _free_last(folder, keep)
        with write_errors(last):
            _remove_older(folder, keep)
    except WriteError as error:
        raise _not_saved(last, error) from None


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The state that was saved in the file `path`, on the CPU.

    Raises:
        InputError: missing, damaged, or not one of our checkpoints.
    """
    state = checkpoint_file.read(Path(path))
    check_state(state, Path(path))
    return state


def newest_checkpoint(folder: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint of last.pt, last-1.pt, ... and its state; None where there is no file.

    Each damaged checkpoint is renamed to NAME.damaged, out of the rotation of `save_last`, and `say` gets a
    line. If all are damaged, they stay as they are. Only one process of a run may call this.

    Raises:
        InputError: all are damaged, or the newest was written by another program or version.
        RunError: a damaged one cannot be renamed.
    """
    found, damaged = _newest_whole(folder)
    if found is None:
        if damaged:
            raise InputError("; ".join(damaged.values()))
        return None
    path, state = found
    for broken, reason in damaged.items():
        say(f"{reason}; {path.name} of iteration {state['iteration']} is used instead")
        try:
            os.replace(broken, broken.with_name(broken.name + ".damaged"))
        except OSError as error:
            raise RunError(f"{broken}: cannot be renamed: {error.strerror or error}") from None
    return found


def last_checkpoints(folder: Path) -> list[Path]:
    """The existing ones of last.pt, last-1.pt, ..., newest first. Raises OSError."""
    paths = [folder / name for name in os.listdir(folder)]
    return sorted((path for path in paths if _age(path) >= 0), key=_age)


def find_checkpoint(path: str | Path) -> Path:
    """`path` itself where it is a file; best.pt of the run folder `path`, else its newest last.pt.

    Raises:
        InputError: no such file or folder, or no checkpoint in the folder.
    """
    path = Path(path)
    if path.is_dir():
        found = _checkpoints(path)
        if not found:
            raise InputError(f"{path}: no best.pt or last.pt in this folder")
        return found[0]
    if not path.exists():
        raise InputError(f"{path}: no such run or checkpoint")
    return path


def load_run(path: str | Path, device: torch.device | str) -> LoadedRun:
    """The networks of a run folder or checkpoint file, ready to evaluate on `device`. Raises InputError."""
    file = find_checkpoint(path)
    try:
        state = load_checkpoint(file)
    except DamagedCheckpointError as error:
        others = [other.name for other in _checkpoints(file.parent) if other.name != file.name]
        beside = f"; beside it: {', '.join(others)}" if others else "; no other checkpoint is beside it"
        raise InputError(f"{error}{beside}") from None
    config = parse_stored_config(state["config"], str(file))
    classes = tuple(state["classes"])
    # The file may ask for any size: shapes are compared before memory is.
    with torch.device("meta"):
        expected = build_method(config, len(classes)).state_dict()
    check_keys(expected, state["method"], file, "its own configuration")
    method = build_method(config, len(classes))
    restore(method, state["method"], file)
    method.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    networks = {name: network.eval() for name, network in method.networks().items()}
    palette = np.asarray(state["palette"], dtype=np.uint8)
    return LoadedRun(file, config, classes, palette, state["iteration"], networks)


def restore(method: Method, state: dict[str, Any], origin: Path) -> None:
    """Loads a method's state strictly; it must be finite. Raises InputError naming `origin`."""
    check_keys(method.state_dict(), state, origin, "this configuration")
    try:
        method.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{origin}: does not fit this configuration: {reason}") from None


def _newest_whole(folder: Path) -> tuple[tuple[Path, dict[str, Any]] | None, dict[Path, str]]:
    """The newest undamaged one of the last checkpoints, and the fault of each newer one."""
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
    except (FileNotFoundError, NotADirectoryError):  # the latter is reported where the folder is made
        return []
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror or error}") from None


def _not_saved(path: Path, error: WriteError) -> RunError:
    """The error and the checkpoint from which the run can go on."""
    rest = "no whole last.pt is beside it"
    with contextlib.suppress(InputError):
        found, _ = _newest_whole(path.parent)
        if found is not None:
            rest = f"{found[0].name} of iteration {found[1]['iteration']} is whole"
    return RunError(f"{error}; {rest}")


def _free_last(folder: Path, keep: int) -> None:
    """Frees the name last.pt: each file takes the next older name, up to the first free one. Raises OSError.

    The oldest of `keep` is overwritten only where all names are taken. At every moment the others exist.
    """
    present = {_age(path) for path in last_checkpoints(folder)}
    free = next(age for age in range(keep) if age not in present or age == keep - 1)
    for age in range(free, 0, -1):
        os.replace(folder / _name(age - 1), folder / _name(age))


def _remove_older(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, as after a run that kept more. Raises OSError."""
    for path in last_checkpoints(folder):
        if _age(path) >= keep:
            path.unlink()


def _age(path: Path) -> int:
    """0 for last.pt, n for last-n.pt, -1 for any other file."""
    found = re.fullmatch(r"last(?:-([1-9]\d*))?\.pt", path.name)
    return int(found[1] or 0) if found else -1


def _name(age: int) -> str:
    return f"last-{age}.pt" if age else "last.pt"
