"""Reading metrics.jsonl, the record that a run keeps of itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prcl_fast.errors import InputError


@dataclass(frozen=True)
class Metrics:
    """The records of a run in order of writing, each with "iteration" and what its method logs."""

    train: tuple[Mapping[str, Any], ...]
    evaluations: tuple[Mapping[str, Any], ...]


def read_metrics(path: Path) -> Metrics:
    """Reads metrics.jsonl.

    Raises:
        InputError: missing, without any record, or corrupt, with the number of the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a run writes it while it trains") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    records: dict[str, list[Mapping[str, Any]]] = {"train": [], "eval": []}
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            record = _record(f"{path}:{number}", line)
            records[record["kind"]].append(record)
    if not records["train"] and not records["eval"]:
        raise InputError(f"{path}: holds no record yet")
    return Metrics(tuple(records["train"]), tuple(records["eval"]))


def series(records: Iterable[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and values of one key, float64 [n] each; records without it, or with null, are left out."""
    pairs = [(record["iteration"], record[key]) for record in records if record.get(key) is not None]
    iterations, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return iterations, values


def _record(where: str, line: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        raise InputError(f"{where}: not a line of JSON") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object")
    if record.get("kind") not in ("train", "eval"):
        raise InputError(f"{where}: kind: expected train or eval, got {record.get('kind')!r}")
    if type(record.get("iteration")) is not int:
        raise InputError(f"{where}: iteration: expected an integer, got {record.get('iteration')!r}")
    for key in DRAWN & record.keys():
        value = record[key]
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise InputError(f"{where}: {key}: expected a number, got {value!r}")
    return record


# The keys that figures draw; the others may hold anything.
DRAWN = {
    *("loss", "loss_supervised", "loss_unsupervised", "loss_contrast", "chance", "miou", "miou_student"),
    *("variance_mean", "variance_std", "mu_mean", "mu_std"),
    *("variance_auroc", "variance_auroc_student", "confidence_auroc"),
}


@dataclass(frozen=True)
class RunResult:
    """The results of a run so far; None where there is no such record yet. mIoU in %."""

    miou: float | None  # of the last evaluation, of the network that counts
    miou_student: float | None
    best_miou: float | None
    iteration: int  # of the newest record
    seconds: float | None  # of training, until its last record
    evaluations: tuple[Mapping[str, Any], ...] = ()


def read_result(folder: Path) -> RunResult:
    """The results of the run in `folder`.

    Raises:
        InputError: its metrics are missing or corrupt; the line is named.
    """
    path = folder / "metrics.jsonl"
    if path.is_file() and path.stat().st_size == 0:  # a run that has just started
        return RunResult(None, None, None, 0, None)
    metrics = read_metrics(path)
    last: Mapping[str, Any] = metrics.evaluations[-1] if metrics.evaluations else {}
    values = [record["miou"] for record in metrics.evaluations if record.get("miou") is not None]
    seconds = metrics.train[-1].get("seconds") if metrics.train else None
    return RunResult(
        last.get("miou"),
        last.get("miou_student"),
        max(values, default=None),
        max(record["iteration"] for record in (*metrics.train, *metrics.evaluations)),
        seconds if isinstance(seconds, (int, float)) else None,
        metrics.evaluations,
    )
