"""`prcl compare RUN...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prcl_fast.console import note, print_table, say


def compare_command(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders that contain run folders.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for compare.md, .csv, .json and .png (curves of mIoU)."),
    ] = None,
) -> None:
    """Compare runs: settings in which they differ, results over seeds.

    Mean and standard deviation are over the seeds. Runs that differ only in seed, output and the seed in a
    split's path form one row.
    """
    from prcl_fast.analysis.comparison import compare, find_runs
    from prcl_fast.analysis.comparison_files import write_comparison

    comparison = compare(find_runs(runs))
    header = comparison.header()
    print_table(
        "Validation mIoU in %, mean ± sample standard deviation over seeds",
        header,
        comparison.rows(bold=""),
        range(len(comparison.columns), len(header)),
    )
    for warning in comparison.warnings:
        note(f"warning: {warning}")
    if out is not None:
        for path in write_comparison(comparison, out):
            say(str(path))
