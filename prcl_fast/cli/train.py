"""`prcl train CONFIG [key.path=value ...]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from prcl_fast.cli.arguments import ConfigFile, Overrides
from prcl_fast.files.json_text import json_text

if TYPE_CHECKING:
    from prcl_fast.config import Config
    from prcl_fast.engine.resume import AllowedChanges
    from prcl_fast.processes.session import Session
    from prcl_fast.runs.text_log import TextLog


def train_command(
    config: ConfigFile,
    overrides: Overrides = None,
    extend: Annotated[
        bool,
        typer.Option("--extend", help="Train the run in the output folder on to more train.iterations."),
    ] = False,
    accept_data: Annotated[
        bool,
        typer.Option("--accept-data", help="Go on although lists or files of the data set have changed."),
    ] = False,
) -> None:
    """Train and evaluate one run; the same command resumes it.

    A run whose output folder holds its own checkpoint continues from it. Progress goes to standard error; the
    last line on standard output is one JSON object.
    """
    from prcl_fast.config import load_config
    from prcl_fast.processes.session import session
    from prcl_fast.runs.text_log import TextLog

    notes: list[str] = []  # printed by rank 0
    with session(
        "train",
        lambda: load_config(config, overrides or [], notes.append),
        lambda loaded: loaded.train.device,
        lambda loaded: loaded.train.stall_timeout,
        lambda loaded: loaded.train.graph,
    ) as run:
        lines = TextLog(run.console)
        for note in notes:
            lines.say(f"prcl: {note}")
        from prcl_fast.engine.resume import AllowedChanges

        allowed = AllowedChanges(extend=extend, data=accept_data)
        run.result(json_text(train(run.loaded, run, lines, allowed)))


def train(config: Config, run: Session[Any], lines: TextLog, allowed: AllowedChanges) -> dict[str, Any]:
    """Trains `config` to its end and draws its figures; returns the summary.

    Args:
        lines: for the user; from the start of the run on they also go to its log.txt.
        allowed: changes with which the run in the output folder may go on.

    Raises:
        InputError: a mistake in the configuration, or a run in its folder that cannot go on.
        RunError: the run has failed.
    """
    from prcl_fast.analysis.figures import write_figures
    from prcl_fast.engine.trainer import Trainer
    from prcl_fast.files.locking import FolderInUseError
    from prcl_fast.processes.collectives import rank
    from prcl_fast.processes.output import locked_output

    run.watchdog.record = lines.error
    with locked_output(config.output, "output"), lines.errors():
        trainer = Trainer(config, lines, device=run.device, watchdog=run.watchdog, allowed=allowed)
        summary = trainer.run()
        if rank() == 0:
            try:
                for figure in write_figures(config.output, run.device):
                    lines.say(f"figure: {figure}")
            except FolderInUseError as error:  # by `prcl figures`, which draws the same
                lines.say(str(error))
    return summary
