"""`prcl demo`: three methods on a small generated data set, compared in a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prcl_fast.cli.train import train
from prcl_fast.console import print_table
from prcl_fast.console.text import duration
from prcl_fast.files.json_text import json_text

if TYPE_CHECKING:
    from prcl_fast.console.plain import PlainConsole

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
    """Train three methods on a small generated data set.

    A table compares them. Takes some minutes on a CPU. The table goes to standard error; the last line on
    standard output is one JSON object.
    """
    from prcl_fast.config import SyntheticConfig, load_config
    from prcl_fast.data.sources.synthetic import write_synthetic
    from prcl_fast.engine.resume import NO_CHANGES
    from prcl_fast.processes.collectives import broadcast_text, rank
    from prcl_fast.processes.session import session
    from prcl_fast.runs.text_log import TextLog

    data = out / "data"
    with session("demo", lambda: None, lambda _: "auto") as run:
        if rank() == 0 and not (data / "config.yaml").exists():
            write_synthetic(data, SyntheticConfig())
        broadcast_text("")  # the other ranks wait for the data
        configs = {
            title: load_config(data / "config.yaml", [f"output={out / title.split()[0]}", *changes])
            for title, changes in METHODS.items()
        }
        results = {}
        for title, config in configs.items():
            run.console.rule(title)
            results[title] = train(config, run, TextLog(run.console), NO_CHANGES)
        labeled = next(iter(configs.values())).data.synthetic.labeled
        _show(results, f"Validation mIoU in %, {labeled} labeled images", run.console)
        run.result(json_text(results))


def _show(results: dict[str, dict[str, Any]], title: str, console: PlainConsole) -> None:
    rows = [
        (name, f"{result['miou']:.1f}", f"{result['miou_student']:.1f}", duration(result["seconds"]))
        for name, result in sorted(results.items(), key=lambda item: -item[1]["miou"])
    ]
    print_table(title, ("method", "mIoU", "mIoU (student)", "time"), rows, right=(1, 2, 3), console=console)
    for result in results.values():
        for figure in sorted((Path(result["output"]) / "figures").glob("*.png")):
            console.print(str(figure))
