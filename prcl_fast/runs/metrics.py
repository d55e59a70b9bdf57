"""The metrics of a run, metrics.jsonl: its lines, its records and the run's results."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prcl_fast.errors import InputError
from prcl_fast.files.reading import read_bytes

METRICS = "metrics.jsonl"
KINDS = ("train", "eval", "extend")  # extend: the run goes on with more iterations in all
_TAIL = 1 << 18  # bytes that hold the newest records: some hundred
_LONGEST = 1 << 30  # bytes of a file; a run of 10^6 records writes less
_LATEST = 1 << 53  # iterations beyond it are no float64

# The keys that figures and tables show; the others may hold anything.
DRAWN = {
    "seconds",
    *("loss", "loss_supervised", "loss_unsupervised", "loss_contrast", "chance", "miou", "miou_student"),
    *("variance_mean", "variance_std", "mu_mean", "mu_std"),
    *("variance_auroc", "variance_auroc_student", "confidence_auroc"),
}


@dataclass(frozen=True)
class Line:
    """A line of metrics.jsonl.

    Attributes:
        text: its bytes, without the line end.
        record: what it holds; None where it holds no record.
        fault: what is wrong with it, "" where nothing is.
        torn: it has no line end and no record: its writer was killed, or is still writing.
    """

    text: bytes
    record: Mapping[str, Any] | None
    fault: str
    torn: bool


@dataclass(frozen=True)
class Metrics:
    """The records of a run in order of writing, each with "iteration" and what its method logs."""

    train: tuple[Mapping[str, Any], ...]
    evaluations: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class RunResult:
    """The results of a run so far; None where there is no such record yet. mIoU in %."""

    miou: float | None  # of the last evaluation, of the main network
    miou_student: float | None
    best_miou: float | None
    iteration: int  # of the newest record
    seconds: float | None  # of training, until its last record
    evaluations: tuple[Mapping[str, Any], ...] = ()


def read_lines(path: Path, *, tail: bool = False) -> list[Line]:
    """The lines of metrics.jsonl in order, blank ones included.

    Args:
        tail: only the newest lines; enough for the state of a run, however long it is.

    Raises:
        InputError: naming the file: missing, no plain file, too long or not readable.
    """
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file; a run writes it while it trains")
    content = read_bytes(path, "metrics file", _LONGEST, tail=_TAIL if tail else None)
    *lines, end = content.split(b"\n")
    if tail and len(content) == _TAIL:
        lines = lines[1:]  # the rest of a line
    return [_line(text, ended=True) for text in lines] + [_line(end, ended=False)]


def read_metrics(path: str | Path) -> Metrics:
    """The records of metrics.jsonl. A torn last line is left out.

    Raises:
        InputError: as `read_lines` does; no record, or a faulty line, which is named by its number.
    """
    records: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in KINDS}
    for number, line in enumerate(read_lines(Path(path)), start=1):
        if line.record is not None:
            records[line.record["kind"]].append(line.record)
        elif line.fault and not line.torn:
            raise InputError(f"{path}:{number}: {line.fault}")
    if not records["train"] and not records["eval"]:
        raise InputError(f"{path}: holds no record yet")
    return Metrics(tuple(records["train"]), tuple(records["eval"]))


def newest_records(path: Path) -> list[Mapping[str, Any]]:
    """The last records of metrics.jsonl, newest first, none where it is missing; faulty lines are left out.

    Raises:
        InputError: the file cannot be read.
    """
    if not os.path.exists(path):
        return []
    return [line.record for line in reversed(read_lines(path, tail=True)) if line.record is not None]


def read_result(folder: str | Path) -> RunResult:
    """The results of the run in `folder`.

    Raises:
        InputError: its metrics are missing or corrupt; the line is named.
    """
    path = Path(folder) / METRICS
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


def series(records: Iterable[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and values of one key, float64 [n] each; records without it, or with null, are left out."""
    pairs = [(record["iteration"], record[key]) for record in records if record.get(key) is not None]
    iterations, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return iterations, values


def _line(text: bytes, *, ended: bool) -> Line:
    if not text.strip():
        return Line(text, None, "", torn=False)
    try:
        record = json.loads(text.decode())
    except UnicodeDecodeError:
        return Line(text, None, "cannot be read as UTF-8 text", torn=False)
    except (ValueError, RecursionError):  # also a number of too many digits; nested too deep
        return Line(text, None, "not a line of JSON", torn=not ended)
    fault = _fault(record)
    return Line(text, None if fault else record, fault, torn=False)


def _fault(record: object) -> str:
    if not isinstance(record, dict):
        return "expected a JSON object"
    if record.get("kind") not in KINDS:
        return f"kind: expected {', '.join(KINDS[:-1])} or {KINDS[-1]}, got {_shown(record.get('kind'))}"
    iteration = record.get("iteration")
    if type(iteration) is not int or not 0 <= iteration < _LATEST:
        return f"iteration: expected an integer, got {_shown(iteration)}"
    for key in sorted(DRAWN & record.keys()):
        if record[key] is not None and not _is_number(record[key]):
            return f"{key}: expected a number, got {_shown(record[key])}"
    return ""


def _is_number(value: object) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # an integer beyond float64
        return False


def _shown(value: object) -> str:
    text = type(value).__name__ if isinstance(value, (dict, list)) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
