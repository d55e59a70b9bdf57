"""`prcl train CONFIG [key.path=value ...]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prcl_fast.cli.arguments import ConfigFile, Overrides
from prcl_fast.config import Config, load_config
from prcl_fast.files.json_text import json_text

if TYPE_CHECKING:
    from prcl_fast.processes.session import Session


def train_command(
    config: ConfigFile,
    overrides: Overrides = None,
) -> None:
    """Train and evaluate one run; the same command resumes it.

    A run whose output folder holds its own checkpoint continues from it. Progress goes to standard error; the
    last line on standard output is one JSON object.
    """
    from prcl_fast.processes.session import session

    notes: list[str] = []  # printed by rank 0
    with session(
        lambda: load_config(config, overrides or [], notes.append),
        lambda loaded: loaded.train.device,
        lambda loaded: loaded.train.stall_timeout,
        lambda loaded: loaded.train.graph,
    ) as run:
        for note in notes:
            run.console.print(f"prcl: {note}", highlight=False, markup=False, soft_wrap=True)
        run.result(json_text(train(run.loaded, run)))


def train(config: Config, run: Session[Any]) -> dict[str, Any]:
    """Trains `config` to its end and draws its figures; returns the summary. Raises RunError, InputError."""
    from prcl_fast.analysis.figures import write_figures
    from prcl_fast.engine.trainer import Trainer
    from prcl_fast.processes.collectives import rank

    summary = Trainer(config, run.console, device=run.device, watchdog=run.watchdog).run()
    if rank() == 0:
        for figure in write_figures(config.output, run.device):
            run.console.print(f"figure: {figure}", highlight=False, soft_wrap=True)
    return summary
