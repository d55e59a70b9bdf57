"""The table of a sweep: rows are the entries of the first axis, columns those of the other axes."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prcl_fast.analysis.seed_statistics import Summary, cell_texts, csv_table, markdown_table, summarize
from prcl_fast.analysis.style import save_figure
from prcl_fast.files.json_text import json_text
from prcl_fast.files.writing import write_text
from prcl_fast.machine.description import provenance
from prcl_fast.runs.folder import RunState, run_state
from prcl_fast.runs.metrics import RunResult, read_result
from prcl_fast.runs.provenance import read_records
from prcl_fast.sweep.config import Sweep
from prcl_fast.sweep.figure import draw_sweep

Score = Literal["miou", "best_miou"]
TITLES: dict[Score, str] = {"miou": "Last evaluation", "best_miou": "Best evaluation"}
_RESULTS = ("miou", "miou_student", "best_miou", "seconds")
_NOTHING = RunResult(None, None, None, 0, None)


@dataclass(frozen=True)
class SweepTable:
    """A sweep with the states of its runs and the results of the finished ones, by name."""

    sweep: Sweep
    states: dict[str, RunState]
    results: dict[str, RunResult]

    @property
    def rows(self) -> list[str]:
        """The entries of the first axis."""
        return list(next(iter(self.sweep.axes.values())))

    @property
    def columns(self) -> list[tuple[str, ...]]:
        """The entries of the other axes; one empty column if there is a single axis."""
        return list(itertools.product(*list(self.sweep.axes.values())[1:]))

    def summary(self, row: str, column: tuple[str, ...], score: Score) -> Summary | None:
        """One cell, over the finished seeds."""
        runs = [run.name for run in self.sweep.runs if run.entries == (row, *column)]
        return summarize(getattr(self.results[name], score) for name in runs if name in self.results)

    def header(self) -> list[str]:
        """The names of the axes, then one name a column."""
        names = list(self.sweep.axes)
        return [" / ".join(names), *(", ".join(column) or "mIoU" for column in self.columns)]

    def cells(self, score: Score, *, bold: str = "**") -> list[list[str]]:
        """The rows as text, each with its name first; the best mean of each column is bold."""
        columns = [
            cell_texts([self.summary(row, column, score) for row in self.rows], bold=bold)
            for column in self.columns
        ]
        return [[row, *texts] for row, *texts in zip(self.rows, *columns, strict=True)]

    def caption(self) -> str:
        """The meaning of the numbers, and the number of unfinished runs."""
        seeds = ", ".join(map(str, self.sweep.seeds))
        text = f"Validation mIoU in %, mean ± sample standard deviation over seeds {seeds}."
        if len(self.sweep.seeds) == 1:
            text = f"Validation mIoU in %, seed {seeds}."
        missing = len(self.sweep.runs) - len(self.results)
        return f"{text} {missing} of {len(self.sweep.runs)} runs are not finished." if missing else text


def read_table(sweep: Sweep) -> SweepTable:
    """The table of the runs so far.

    Raises:
        InputError: a run's folder holds a run of another configuration, or its metrics are corrupt.
    """
    states = {run.name: run_state(run.config) for run in sweep.runs}
    results = {run.name: read_result(run.config.output) for run in sweep.runs if states[run.name].done}
    return SweepTable(sweep, states, results)


def write_table(table: SweepTable) -> Path:
    """Writes table.md, .csv, .json and, once a run is done, .png into the sweep's folder; returns table.md.

    Raises:
        WriteError: a file cannot be written.
    """
    folder = table.sweep.output
    texts = {"table.csv": _csv(table), "table.json": _json(table), "table.md": _markdown(table)}
    for name, text in texts.items():
        write_text(folder / name, text)
    if table.results:
        axes = list(table.sweep.axes)
        means = {
            (row, *column): summary
            for row in table.rows
            for column in table.columns
            if (summary := table.summary(row, column, "miou")) is not None
        }
        save_figure(draw_sweep(axes, means), folder / "table.png")
    return folder / "table.md"


def _markdown(table: SweepTable) -> str:
    parts = [f"# {table.sweep.output.absolute().name}\n", f"{table.caption()}\n"]
    for score, title in TITLES.items():
        parts += [f"## {title}\n", markdown_table(table.header(), table.cells(score), names=1)]
    return "\n".join(parts)


def _csv(table: SweepTable) -> str:
    rows = []
    for run in table.sweep.runs:
        result = table.results.get(run.name, _NOTHING)
        rows.append([*run.entries, run.seed, *(getattr(result, key) for key in _RESULTS)])
    return csv_table([*table.sweep.axes, "seed", *_RESULTS], rows)


def _json(table: SweepTable) -> str:
    sweep = table.sweep
    runs = [
        {
            "name": run.name,
            "axes": dict(zip(sweep.axes, run.entries, strict=True)),
            "seed": run.seed,
            "state": str(table.states[run.name]),
            "iterations": table.states[run.name].total,
            **{key: getattr(table.results.get(run.name, _NOTHING), key) for key in _RESULTS},
            "output": str(run.config.output),
            "starts": read_records(run.config.output),
        }
        for run in sweep.runs
    ]
    cells = [
        {
            "axes": dict(zip(sweep.axes, (row, *column), strict=True)),
            **{score: _plain(table.summary(row, column, score)) for score in TITLES},
        }
        for row in table.rows
        for column in table.columns
    ]
    tree = {"sweep": str(sweep.path), "output": str(sweep.output), "runs": runs, "cells": cells}
    return json_text(tree | provenance(), indent=1) + "\n"


def _plain(summary: Summary | None) -> dict[str, float | int | None] | None:
    return None if summary is None else dataclasses.asdict(summary)
