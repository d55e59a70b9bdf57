"""Paths of a run's class prototypes over training, from its checkpoints and its log."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prcl_fast.analysis.cluster_quality import normalized
from prcl_fast.analysis.prototypes import Prototypes, stored_prototypes
from prcl_fast.config import parse_stored_config
from prcl_fast.errors import InputError
from prcl_fast.runs.checkpoint import find_checkpoint, last_checkpoints, load_checkpoint
from prcl_fast.runs.folder import EXTENDABLE, settings
from prcl_fast.runs.metrics import read_metrics


@dataclass(frozen=True)
class PathPoint:
    """The prototypes of one checkpoint."""

    file: Path
    iteration: int
    prototypes: Prototypes


def prototype_path(
    main: Path, others: Sequence[Path], of_pixels: Callable[[Path], Prototypes]
) -> list[PathPoint]:
    """The prototypes at the iteration of each checkpoint, the earliest first.

    Args:
        main: a checkpoint file.
        others: more checkpoint files of its run, or their folders.
        of_pixels: computes the prototypes of a checkpoint file if the run keeps none.

    Raises:
        InputError: a checkpoint cannot be read, or has another configuration or other classes.
    """
    path: dict[int, PathPoint] = {}
    run: tuple[dict[str, Any], list[str]] | None = None
    for file in [main, *map(find_checkpoint, others)]:
        state = load_checkpoint(file)
        config = parse_stored_config(state["config"], str(file))
        values = settings(config)
        del values[EXTENDABLE]  # a run that was extended has checkpoints of both totals
        its_run = values, state["classes"]
        run = run or its_run
        if its_run != run:
            raise InputError(f"{file}: is of another run than {main}: configuration or classes differ")
        iteration = state["iteration"]
        if iteration not in path:
            prototypes = stored_prototypes(config.method, state["method"]) or of_pixels(file)
            path[iteration] = PathPoint(file, iteration, prototypes)
    return [path[iteration] for iteration in sorted(path)]


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run folder; none if `run` is a file."""
    if not run.is_dir():
        return []
    best = run / "best.pt"
    return [*([best] if best.is_file() else []), *last_checkpoints(run)]


def moves(path: Sequence[PathPoint], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Each checkpoint, and by class the distance of L2-normalised means from the checkpoint before it.

    For K prototypes of a class it is the mean distance.
    """
    result: list[dict[str, Any]] = []
    before: np.ndarray = np.full((len(classes), 1, 1), np.nan)
    for point in path:
        mean = normalized(point.prototypes.mean)
        distances = np.linalg.norm(mean - before, axis=2).mean(axis=1)
        moved = {
            name: None if np.isnan(distance) else float(distance)
            for name, distance in zip(classes, distances, strict=True)
        }
        result.append({"file": str(point.file), "iteration": point.iteration, "moved": moved})
        before = mean
    return result


def logged_shift(run: Path, num_classes: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Iterations [n] and `prototype_shift` [n, C] of a run's log, nan for null; None if not logged.

    Raises:
        InputError: the log cannot be read, or the key has another type or size.
    """
    log = run / "metrics.jsonl"
    if not os.path.lexists(log):
        return None
    records = [record for record in read_metrics(log).train if "prototype_shift" in record]
    if not records:
        return None
    try:
        shift = np.array([record["prototype_shift"] for record in records], dtype=np.float64)
        if shift.shape != (len(records), num_classes):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{log}: prototype_shift: expected a number for each class") from None
    return np.array([record["iteration"] for record in records]), shift
