"""The provenance of a run: a record of each command that has trained it."""

from __future__ import annotations

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

from prcl_fast.files.writing import append
from prcl_fast.machine.description import provenance

PROVENANCE = "provenance.jsonl"


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
    """Appends a record to provenance.jsonl of the run in `folder`. Raises WriteError."""
    append(folder / PROVENANCE, json.dumps(record).encode() + b"\n")


@functools.cache
def _of_process() -> Mapping[str, Any]:
    """Versions, machine and commit: they stay as they were when the process loaded the package."""
    return provenance()
