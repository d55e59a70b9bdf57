"""`prcl demo`: three methods on a small generated data set, compared in a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from prcl_fast.analysis.duration import duration_text
from prcl_fast.cli.train import train
from prcl_fast.config import Config, SyntheticConfig, load_config

METHODS = {
    "prcl": [],
    "mean_teacher + classmix": [
        "method.name=mean_teacher",
        "method.mix=classmix",
        "method.delta_u=0.95",
        "method.ema=0.97",
    ],
    "supervised": ["method.name=supervised"],
}


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the data set and the three runs.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Train three methods on a small generated data set and compare them."""
    from prcl_fast.data.sources.synthetic import write_synthetic
    from prcl_fast.engine.resume import NO_CHANGES
    from prcl_fast.processes.session import session
    from prcl_fast.runs.text_log import TextLog

    def load() -> dict[str, Config]:
        data = out / "data"
        if not (data / "config.yaml").exists():
            write_synthetic(data, SyntheticConfig())
        return {
            title: load_config(data / "config.yaml", [f"output={out / title.split()[0]}", *changes])
            for title, changes in METHODS.items()
        }

    with session("demo", load, lambda _: "auto") as run:
        results = {}
        for title, config in run.loaded.items():
            run.console.rule(title)
            results[title] = train(config, run, TextLog(run.console), NO_CHANGES)
        _show(results, run.console)
        run.result(json.dumps(results))


def _show(results: dict[str, dict[str, Any]], console: Console) -> None:
    table = Table(title=f"Validation mIoU, %, {SyntheticConfig().labeled} labeled images")
    for column in ("method", "mIoU", "mIoU (student)", "time"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for title, result in sorted(results.items(), key=lambda item: -item[1]["miou"]):
        scores = (f"{result[key]:.1f}" for key in ("miou", "miou_student"))
        table.add_row(title, *scores, duration_text(result["seconds"]))
    console.print(table)
    for result in results.values():
        for figure in sorted((Path(result["output"]) / "figures").glob("*.png")):
            console.print(str(figure), highlight=False, soft_wrap=True)
