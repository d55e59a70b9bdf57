"""The cases of a run, and its result.

A result is a dict: `kind`, `machine`, `options`, `ceilings`, and `rows`, one for each op, direction and
candidate. A candidate that could not run has a row, too, whose `note` gives the reason.
"""

from __future__ import annotations

import gc
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.ops import CANDIDATES, ceilings
from bench.ops.case import Case, Ceilings, Options, Work
from bench.ops.harness import Measured, first_calls, percentile, time_in_turns
from prcl_fast.errors import InputError
from prcl_fast.files.writing import write_text

KIND = "prcl bench 1"
RESULT_DIFFERS = "its result differs"  # the note of such a row
Row = dict[str, Any]
# The identity of a row: rows with equal values may be compared.
KEY = ("op", "variant", "size", "dtype", "labels", "shape", "direction", "candidate")


def run(
    ops: Sequence[str],
    options: Options,
    rounds: int,
    candidates: Sequence[str],
    *,
    progress: Callable[[str], None] = lambda text: None,
    finished: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Measures the ceilings and then the ops, in their order.

    Args:
        progress: called with a line of progress.
        finished: called with the result so far after every case.
    """
    progress("ceilings")
    limits, report = ceilings.measure(options.device)
    result: dict[str, Any] = {
        "kind": KIND,
        "machine": machine.describe(options.device),
        "options": {
            "size": options.size,
            "dtype": str(options.dtype).removeprefix("torch."),
            "labels": options.labels,
            "rounds": rounds,
        },
        "ceilings": report,
        "rows": [],
    }
    for op in ops:
        progress(f"{op}: inputs")
        cases = importlib.import_module(f"bench.ops.{op}").cases(options)
        while cases:
            case = cases.pop(0)
            result["rows"] += _rows(op, case, options, limits, rounds, candidates, progress)
            finished(result)
            del case
            gc.collect()
            torch.compiler.reset()
            if options.device == "cuda":
                torch.cuda.empty_cache()
    return result


def broken_rows(result: Mapping[str, Any]) -> list[Row]:
    """Rows of the package's backends that failed, or whose error exceeds its bound."""
    return [
        row
        for row in result["rows"]
        if row["broken"]
        or (None not in (row["error"], row["error_bound"]) and row["error"] > row["error_bound"])
    ]


def label(row: Mapping[str, Any]) -> str:
    """The name of an op and variant in tables and figures."""
    return f"{row['op']} {row['variant']}".strip()


def write_result(result: Mapping[str, Any], path: Path) -> None:
    """Writes JSON, whole or not at all. Raises WriteError."""
    write_text(path, json.dumps(result, indent=1, allow_nan=False) + "\n")


def read_result(path: Path, kind: str = KIND) -> dict[str, Any]:
    """Reads a result of `write_result`. Raises InputError for another file or another kind."""
    try:
        result = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise InputError(f"{path}: is not JSON") from None
    if not isinstance(result, dict) or result.get("kind") != kind:
        raise InputError(f"{path}: is not a result of the kind {kind!r}")
    return result


def _rows(
    op: str,
    case: Case,
    options: Options,
    limits: Ceilings,
    rounds: int,
    candidates: Sequence[str],
    progress: Callable[[str], None],
) -> list[Row]:
    title = f"{op} {case.variant}".strip()
    measured: dict[str, Measured] = {}
    errors: dict[str, Mapping[str, float]] = {}
    for name in [name for name in CANDIDATES if name in candidates and name in case.candidates]:
        progress(f"{title}: {name}")
        found = first_calls(case, case.candidates[name], options.device)
        if found.outcome is not None:
            progress(f"{title}: {name} against float64")
            errors[name] = case.errors(name, found.outcome)
            found.outcome = None  # gradients as large as the features
        measured[name] = found
    progress(f"{title}: {rounds} rounds")
    time_in_turns(case, measured, options.device, rounds)

    rows = []
    for direction in ("forward", "backward", "both") if case.leaves else ("forward",):
        for name, found in measured.items():
            row = {
                "op": op,
                "variant": case.variant,
                "size": options.size,
                "dtype": str(options.dtype).removeprefix("torch."),
                "labels": options.labels,
                "shape": case.shape,
                "direction": direction,
                "candidate": name,
            }
            rows.append(row | _numbers(case, name, direction, found, errors.get(name, {}), limits))
    return rows


def _numbers(
    case: Case,
    name: str,
    direction: str,
    found: Measured,
    errors: Mapping[str, float],
    limits: Ceilings,
) -> Row:
    candidate = case.candidates[name]
    work = candidate.work or case.work
    parts: list[Work] = [work["forward"], work["backward"]] if direction == "both" else [work[direction]]
    total = sum(parts, Work())
    floor = sum(part.milliseconds(limits) for part in parts)
    times = found.times.get(direction, [])
    ours = name.startswith(("torch", "native", "triton"))
    # With a backward pass, the error of the gradients decides.
    which = "backward" if direction != "forward" else "forward"
    error = errors.get(which)
    note = found.failure or candidate.note
    if not note and error is not None and error > case.bounds[which]:
        note = RESULT_DIFFERS
    return {
        "ms": percentile(times, 50) if times else None,
        "ms_20": percentile(times, 20) if times else None,
        "ms_80": percentile(times, 80) if times else None,
        "rounds": len(times),
        "timing": found.timing,
        "floor_ms": floor,
        "floor_share": floor / percentile(times, 50) if times else None,
        "bytes_streamed": total.streamed,
        "bytes_gathered": total.gathered,
        "instructions": total.instructions,
        "special": total.special,
        "peak_bytes": found.peak if direction != "backward" else None,
        "retained_bytes": found.retained if direction == "both" else None,
        "error": min(error, 1e300) if error is not None else None,  # JSON has no infinity
        "error_bound": case.bounds[which] if ours else None,
        "check": case.check,
        "note": note,
        "broken": found.broken and ours,
    }
