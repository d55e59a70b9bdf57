"""`prcl weights SOURCE`: a run of this program, or a checkpoint of the authors' code, as a network file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert_weights(
    source: Annotated[
        Path, typer.Argument(help="Run folder, checkpoint, or checkpoint of the authors' public PRCL code.")
    ],
    out: Annotated[Path, typer.Option(help="File to write.")],
) -> None:
    """Write the network of a run, or of the authors' code, as one file.

    The file is for `model.weights`. Of a run, the network that gives its mIoU. Of the authors' code, their
    averaged network; a key that is unknown or missing is an error.
    """
    from prcl_fast.console import note
    from prcl_fast.models.convert import convert_authors_checkpoint
    from prcl_fast.runs.trained_network import export_network, is_run

    (export_network if is_run(source) else convert_authors_checkpoint)(source, out)
    note(f"{out}: written")
