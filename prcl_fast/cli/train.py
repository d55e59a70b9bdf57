"""`prcl train CONFIG [key.path=value ...]`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from prcl_fast.config import Config, load_config


def train_command(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Values that replace the file's."),
    ] = None,
) -> None:
    """Train and evaluate one run; started again, it goes on.

    A run that finds its own unfinished state in its output goes on from it. Progress goes to standard error;
    the last line on standard output is one JSON object.
    """
    loaded = load_config(config, overrides or [])
    print(json.dumps(train(loaded, Console(stderr=True))))


def train(config: Config, console: Console) -> dict[str, Any]:
    """Runs `config` to its end, with its figures; returns the summary. Raises RunError, InputError."""
    from prcl_fast.analysis.figures import write_figures
    from prcl_fast.device import choose_device
    from prcl_fast.engine.trainer import Trainer

    summary = Trainer(config, console).run()
    for figure in write_figures(config.output, choose_device(config.train.device)):
        console.print(f"figure: {figure}", highlight=False, soft_wrap=True)
    return summary
