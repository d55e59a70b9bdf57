"""`prcl figures RUN`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prcl_fast.cli.arguments import Device


def figures_command(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    device: Device = "auto",
) -> None:
    """Draw the figures of a run again.

    They are RUN/figures/*.png: curves, representation and a panel of validation images. The paths of the
    files go to standard output.
    """
    from prcl_fast.analysis.figures import write_figures
    from prcl_fast.console import say
    from prcl_fast.device import choose_device

    for path in write_figures(run, choose_device(device)):
        say(str(path))
