"""Runs compared with a first one: a row for each, stored and printed as soon as it is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import machine
from prcl_fast.files.writing import write_text


class ComparedRuns:
    """The rows of a comparison.

    Args:
        kind: of the stored result.
        device: cpu or cuda.
        steps: of each run.
        file: written anew after every row; None writes nothing.
    """

    def __init__(self, kind: str, device: str, steps: int, file: Path | None) -> None:
        self.rows: list[dict[str, Any]] = []
        self._result = {
            "kind": kind,
            "machine": machine.describe(device),
            "steps": steps,
            "rows": self.rows,
        }
        self._file = file

    def add(self, row: dict[str, Any], line: str) -> None:
        """Stores the row and prints its line."""
        self.rows.append(row)
        if self._file is not None:
            write_text(self._file, json.dumps(self._result, indent=1) + "\n")
        print(line, flush=True)
