"""The provenance of a run: a record of each command that has trained it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from prcl_fast.files.reading import read_text
from prcl_fast.files.writing import write_text
from prcl_fast.machine.description import provenance

PROVENANCE = "provenance.jsonl"
_MAX_BYTES = 2**26


def start_record(
    iteration: int, total: int, device: torch.device, processes: int, data: Mapping[str, str]
) -> dict[str, Any]:
    """The record of this process's command, plain types.

    Args:
        iteration: optimiser steps done before it.
        total: `train.iterations`.
        device: of rank 0.
        data: the identity of the data set.
    """
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "directory": os.getcwd(),
        "iteration": iteration,
        "total": total,
        "device": str(device),
        "processes": processes,
        **_of_process(),
        "data": dict(data),
    }


def add_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Adds a record to provenance.jsonl of the run in `folder`. Raises InputError."""
    lines = [json.dumps(each) + "\n" for each in (*read_records(folder), record)]
    write_text(folder / PROVENANCE, "".join(lines), durable=True)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of the run in `folder`, in order; none for a run of a former version.

    A line that a killed process has cut is left out.

    Raises:
        InputError: the file cannot be read.
    """
    path = folder / PROVENANCE
    if not os.path.exists(path):
        return []
    records = []
    for line in read_text(path, "provenance file", _MAX_BYTES).split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


@functools.cache
def _of_process() -> Mapping[str, Any]:
    """Versions, machine and commit: they stay as they were when the process loaded the package."""
    return provenance()
