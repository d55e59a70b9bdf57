"""What a checkpoint must hold, checked once where it is read: a checksum says nothing of who wrote it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from prcl_fast.errors import InputError
from prcl_fast.models.weights import tensors_of

KINDS: dict[str, type] = {
    "config": dict,
    "classes": list,
    "palette": list,
    "iteration": int,
    "method": dict,
    "optimizer": dict,
    "scaler": dict,
    "progress": dict,
}


def check_state(state: Mapping[str, Any], path: Path) -> None:
    """Raises InputError naming `path` and the entry that is missing or of another kind."""
    for key, kind in KINDS.items():
        if not isinstance(state.get(key), kind):
            raise InputError(f"{path}: incomplete checkpoint, it lacks {key} or holds another kind of it")
    tensors_of(state["method"], path)
    whole = {
        "classes": all(isinstance(name, str) for name in state["classes"]),
        "palette": all(_is_colour(colour) for colour in state["palette"])
        and len(state["palette"]) == len(state["classes"]),
        "iteration": state["iteration"] >= 0 and not isinstance(state["iteration"], bool),
        "progress": _is_progress(state["progress"]),
        "scaler": all(_is_number(value) for value in state["scaler"].values()),
    }
    for key, is_whole in whole.items():
        if not is_whole:
            raise InputError(f"{path}: damaged checkpoint: wrong values in {key}")


def check_optimizer(
    saved: Mapping[str, Any], own: Mapping[str, Any], shapes: Iterable[Any], path: Path
) -> None:
    """Raises InputError unless `saved` has the groups of `own` and momentum of these shapes."""
    groups, buffers = saved.get("param_groups"), saved.get("state")
    same = isinstance(groups, list) and [_names(group) for group in groups] == [
        _names(group) for group in own["param_groups"]
    ]
    shapes = list(shapes)
    if (
        not same
        or not isinstance(buffers, dict)
        or not all(
            isinstance(index, int)
            and 0 <= index < len(shapes)
            and isinstance(entry, dict)
            and set(entry) == {"momentum_buffer"}
            and _is_buffer(entry["momentum_buffer"], shapes[index])
            for index, entry in buffers.items()
        )
    ):
        raise InputError(f"{path}: does not fit this configuration: its optimizer's state is another one's")


def _names(group: object) -> object:
    if not isinstance(group, dict):
        return None
    kinds = {key: type(value) for key, value in group.items() if key not in ("lr", "params")}
    return kinds, group.get("params")


def _is_buffer(value: object, shape: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, Tensor) and not value.is_meta and not value.is_sparse and value.shape == shape


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_colour(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(c) is int and 0 <= c < 256 for c in value)


def _is_progress(progress: Mapping[str, Any]) -> bool:
    numbers = (progress.get(key) for key in ("seconds", "best_miou", "best_iteration", "evaluated"))
    return all(_is_number(value) for value in numbers) and isinstance(progress.get("last"), dict)
