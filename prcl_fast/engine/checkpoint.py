"""Checkpoints: one file with the whole state, written atomically, read without executing anything."""

from __future__ import annotations

import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prcl_fast.config import Config, parse_config
from prcl_fast.errors import InputError
from prcl_fast.methods import Method, build_method

_FORMAT = "prcl_fast-checkpoint"
_VERSION = 1
_KEYS = (
    "config",
    "fingerprint",
    "classes",
    "palette",
    "iteration",
    "method",
    "optimizer",
    "scaler",
    "progress",
)


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
    """Writes `state` so that `path` holds either the former or the new checkpoint, whatever happens."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save({"format": _FORMAT, "version": _VERSION, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, on the CPU.

    Raises:
        InputError: missing, corrupt, or not one of our checkpoints.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        EOFError,
        RuntimeError,
        OSError,
        ValueError,
        KeyError,
    ) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: corrupt, or not a checkpoint: {reason}") from None
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise InputError(f"{path}: not a checkpoint of prcl_fast")
    if state.get("version") != _VERSION:
        raise InputError(f"{path}: checkpoint version {state.get('version')}, this program reads {_VERSION}")
    missing = [key for key in _KEYS if key not in state]
    if missing:
        raise InputError(f"{path}: corrupt checkpoint, it lacks {', '.join(missing)}")
    return state


def find_checkpoint(path: Path) -> Path:
    """A checkpoint file itself, or a run folder's `best.pt`, else its `last.pt`. Raises InputError."""
    if path.is_dir():
        for name in ("best.pt", "last.pt"):
            if (path / name).is_file():
                return path / name
        raise InputError(f"{path}: no best.pt or last.pt in this folder")
    if not path.exists():
        raise InputError(f"{path}: no such run or checkpoint")
    return path


def load_run(path: Path, device: torch.device) -> LoadedRun:
    """The networks of a run folder or checkpoint file, ready to evaluate on `device`. Raises InputError."""
    file = find_checkpoint(path)
    state = load_checkpoint(file)
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
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{origin}: does not fit this configuration: {reason}") from None
