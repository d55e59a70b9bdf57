"""What came out of a run: its last and its best evaluation, its time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prcl_fast.analysis.metrics import read_metrics


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
