"""The table of a set of phases, with numbers from the phases' JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.gpu.runner import Outcome

_WIDTH = 110


def table(name: str, outcomes: Sequence[Outcome]) -> list[str]:
    """One line for each phase, with its numbers below."""
    width = max(len(outcome.name) for outcome in outcomes)
    status = max(len(outcome.status) for outcome in outcomes)
    lines = ["", f"{name:{width}}  {'status':{status}}  {'s':>5}  {'limit':>5}"]
    for x in outcomes:
        line = f"{x.name:{width}}  {x.status:{status}}  {x.seconds:5.0f}  {x.limit:5.0f}  {x.detail}"
        lines += [line.rstrip(), *(f"{'':{width}}  {note[:_WIDTH]}" for note in x.notes)]
    return lines


def notes(folder: Path, name: str) -> list[str]:
    """The numbers of a phase's result; without a result, the last line of its log."""
    path = folder / f"{name}.json"
    if path.is_file():
        try:
            return _of_result(json.loads(path.read_text()))
        except (ValueError, KeyError, TypeError) as error:
            return [f"{path.name}: {type(error).__name__}: {error}"]
    log = folder / f"{name}.log"
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    return [line.strip(" =") for line in lines if line.strip()][-1:]


def _of_result(result: dict[str, Any]) -> list[str]:
    kind = result.get("kind", "")
    if kind.startswith("prcl bench"):
        return _of_ops(result["rows"])
    if kind.startswith("prcl step profile"):
        return _of_step(result)
    if kind.startswith("bench.step"):
        return [", ".join(_milliseconds(row) for row in result["rows"])]
    if "gpu" in result:
        return [
            f"{result['gpu'] or 'no GPU'}; PyTorch {result['torch']}; native: {result['native'] or 'runs'}"
        ]
    return []


def _of_ops(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each op: every candidate's time, forward and backward together if there is a backward."""
    ops: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["direction"] != "backward":
            label = f"{row['op']} {row['variant']}".strip()
            ops.setdefault(label, {})[row["candidate"]] = row
    return [f"{label}: {', '.join(map(_milliseconds, found.values()))}" for label, found in ops.items()]


def _of_step(result: dict[str, Any]) -> list[str]:
    numbers = [f"first step {result['first_step_ms'] / 1e3:.1f} s"]
    if "ms" in result:
        ms, host = statistics.median(result["ms"]), statistics.median(result["host_ms"])
        numbers = [f"{ms:.1f} ms a step, host {host:.1f} ms", *numbers]
    if "peak_gb" in result:
        numbers.append(f"peak {result['peak_gb']:.1f} GB")
    if "launches" in result:
        numbers.append(f"{result['launches']:.0f} launches of {result['kernel_ms']:.1f} ms")
    return ["; ".join(numbers)]


def _milliseconds(row: dict[str, Any]) -> str:
    return f"{row['candidate']} " + (row["note"] or "no time" if row["ms"] is None else f"{row['ms']:.3g} ms")
