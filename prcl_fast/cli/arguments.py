"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prcl_fast.cli.completion import complete_override, one_of

ConfigFile = Annotated[
    Path, typer.Argument(help="Configuration file (YAML); prcl configs lists the bundled ones.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY.PATH=VALUE]...",
        help="Values that replace those of the file, such as train.iterations=2000 'data.crop=[96, 96]'.",
        autocompletion=complete_override,
    ),
]
RunOrCheckpoint = Annotated[
    Path, typer.Argument(help="Run folder (best.pt, or last.pt without one) or checkpoint file.")
]
NetworkName = Annotated[
    str | None,
    typer.Option(
        help="teacher or student; by default the run's main network.",
        autocompletion=one_of("teacher", "student"),
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="auto (a GPU if there is one), cpu, cuda or cuda:N.",
        autocompletion=one_of("auto", "cpu", "cuda"),
    ),
]
SUBSETS = one_of("val", "labeled", "unlabeled")
