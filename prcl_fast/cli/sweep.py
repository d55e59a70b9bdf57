"""`prcl sweep FILE [key.path=value ...]`."""

from __future__ import annotations

import contextlib
import fnmatch
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prcl_fast.cli.completion import complete_override
from prcl_fast.console import note, print_table
from prcl_fast.errors import InputError, RunError
from prcl_fast.files.json_text import json_text

if TYPE_CHECKING:
    from prcl_fast.sweep.config import Sweep, SweepRun
    from prcl_fast.sweep.table import SweepTable


def sweep_command(
    file: Annotated[Path, typer.Argument(help="YAML file of the sweep.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY.PATH=VALUE]...",
            autocompletion=complete_override,
            help="Values for all runs; output=FOLDER replaces the sweep's.",
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Parallel runs; by default 1 on the CPU and one on each GPU."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Only matching runs, such as 'prcl/*/seed_0'; may be repeated."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and their states.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Write the table without training.")] = False,
) -> None:
    """Train all runs of a sweep, and write their table.

    The runs are the product of the sweep's axes and seeds. The same command resumes a sweep: finished runs
    are kept, unfinished ones continue. A run that fails does not stop the others. The table, with mean and
    standard deviation over seeds, goes to standard output and to table.md, .csv, .json and .png in the
    sweep's folder. The last line on standard output is one JSON object.
    """
    from prcl_fast.runs.folder import run_state
    from prcl_fast.sweep.config import read_sweep
    from prcl_fast.sweep.run import check_output
    from prcl_fast.sweep.table import read_table, write_table

    sweep = read_sweep(file, overrides or [])
    chosen = _chosen(sweep, only or [])
    check_output(sweep)
    if dry_run:
        rows = [(run.name, str(run_state(run.config))) for run in chosen]
        print_table(f"{len(rows)} runs in {sweep.output}", ["run", "state"], rows)
        return
    result = read_table(sweep)
    failed: dict[str, str] = {}
    if not table:
        unfinished = [run for run in chosen if not result.states[run.name].done]
        if unfinished:
            _note_repeated(chosen)
        failed = _train(sweep, unfinished, len(chosen) - len(unfinished), jobs)
        result = read_table(sweep)
    path = write_table(result)
    left = [run.name for run in chosen if run.name not in result.results and run.name not in failed]
    if left and not table:
        raise RunError(
            f"stopped: {len(left)} of {len(chosen)} runs are not finished; the same command resumes them"
        )
    _show(result)
    summary = {"output": str(sweep.output), "runs": len(sweep.runs), "done": len(result.results)}
    print(json_text(summary | {"failed": list(failed), "table": str(path)}), flush=True)
    for name, reason in failed.items():
        note(f"prcl: run {name} failed: {reason}")
    if failed:
        raise typer.Exit(1)


def _chosen(sweep: Sweep, patterns: Sequence[str]) -> list[SweepRun]:
    """The runs whose names match any of `patterns`; all runs if there is no pattern."""
    for pattern in patterns:
        if not fnmatch.filter([run.name for run in sweep.runs], pattern):
            raise InputError(f"--only: {pattern!r} matches no run; one is {sweep.runs[0].name}")
    return [
        run
        for run in sweep.runs
        if not patterns or any(fnmatch.fnmatchcase(run.name, pattern) for pattern in patterns)
    ]


def _train(sweep: Sweep, runs: Sequence[SweepRun], done: int, jobs: int | None) -> dict[str, str]:
    """Trains `runs` and keeps the table up to date; returns why runs failed, by their names."""
    from prcl_fast.console.plain import PlainConsole
    from prcl_fast.sweep.progress import SweepProgress
    from prcl_fast.sweep.run import (
        Ended,
        Started,
        Working,
        check_files,
        check_label_files,
        places,
        train_runs,
    )
    from prcl_fast.sweep.table import read_table, write_table

    if not runs:
        return {}
    check_files(runs)
    for line in check_label_files(runs):
        note(f"note: {line}")
    failed: dict[str, str] = {}
    events = train_runs(runs, places(runs, jobs, os.environ))
    with contextlib.closing(events), SweepProgress(runs, done, PlainConsole(stderr=True)) as progress:
        for event in events:
            match event:
                case Started(run):
                    progress.started(run)
                case Working(working):
                    progress.working(working)
                case Ended(run, failure):
                    table = read_table(sweep)
                    result = table.results.get(run.name)
                    if result is not None:
                        write_table(table)
                    if failure is not None:
                        failed[run.name] = failure
                    progress.ended(run, failure, result)
    return failed


def _note_repeated(runs: Sequence[SweepRun]) -> None:
    """Prints a note if an axis changes nothing, so that runs are identical."""
    from prcl_fast.config import config_fingerprint

    first: dict[str, SweepRun] = {}
    repeated = [
        (run, first[key])
        for run in runs
        if first.setdefault(key := config_fingerprint(run.config), run) is not run
    ]
    if repeated:
        run, other = repeated[0]
        more = f" (and {len(repeated) - 1} more)" if len(repeated) > 1 else ""
        note(f"note: run {run.name} has the same configuration as {other.name}{more}")


def _show(table: SweepTable) -> None:
    from prcl_fast.sweep.table import TITLES

    numbers = range(1, len(table.header()))
    for score, title in TITLES.items():
        print_table(f"{title}. {table.caption()}", table.header(), table.cells(score, bold=""), numbers)
