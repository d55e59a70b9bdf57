"""`prcl weights SOURCE`: a checkpoint of the authors' code as one of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert_weights(
    source: Annotated[Path, typer.Argument(help="Checkpoint of the authors' public PRCL code.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
) -> None:
    """Convert a checkpoint of the authors' public code.

    A key that is unknown or missing is an error.
    """
    from prcl_fast.console import note
    from prcl_fast.models.convert import convert_authors_checkpoint

    convert_authors_checkpoint(source, out)
    note(f"{out}: written")
