"""`prcl figures RUN`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def figures_command(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Draw RUN/figures/*.png again: curves, representation and a panel of validation images.

    The names of the files go to standard output.
    """
    from prcl_fast.analysis.figures import write_figures
    from prcl_fast.device import choose_device

    for path in write_figures(run, choose_device(device)):
        print(path)
