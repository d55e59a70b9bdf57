"""`prcl compare RUN...`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from prcl_fast.console import print_table


def compare_command(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders that hold some.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for compare.md, .csv, .json and .png (curves).")
    ] = None,
) -> None:
    """Compare runs: the settings in which they differ, and mean and deviation over their seeds.

    Runs that differ in nothing but seed, output and a split that goes with the seed form one row.
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
        print(f"warning: {warning}", file=sys.stderr)
    if out is not None:
        for path in write_comparison(comparison, out):
            print(path)
