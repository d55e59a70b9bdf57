"""Sweep files, and folders of runs that never ran: a configuration and a record of metrics."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from prcl_fast.config import Config, dump_config
from prcl_fast.sweep.config import Sweep
from support.tiny import tiny_tree


def write_made_up_run(
    config: Config, scores: Mapping[int, float], *, seconds: float = 60.0, until: int | None = None
) -> Path:
    """Writes the folder of a run with the mIoU `scores` by iteration, trained until iteration `until`."""
    last = max([*scores, until or 0])
    records: list[dict[str, object]] = [
        {"kind": "eval", "iteration": iteration, "miou": score, "miou_student": score - 1}
        for iteration, score in scores.items()
    ]
    place = len(records) - (last in scores)  # a run logs before it evaluates
    records.insert(place, {"kind": "train", "iteration": last, "loss": 1.0, "seconds": seconds})
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / "config.yaml").write_text(yaml.safe_dump(dump_config(config), sort_keys=False))
    write_lines(config.output, [json.dumps(record) for record in records])
    return config.output


def write_lines(folder: Path, lines: Sequence[str]) -> None:
    """Writes folder/metrics.jsonl."""
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))


AXES = {
    "method": {
        "supervised": {"set": {"method.name": "supervised"}},
        "mean_teacher + classmix": {"config": "teacher.yaml", "set": {"method.delta_u": 0.5}},
    },
    "labels": {"2": {"set": {"data.synthetic.labeled": 2}}, "4": {}},
}


def write_sweep(folder: Path, **changes: Any) -> Path:
    """folder/study/sweep.yaml of 2 x 2 entries and 2 seeds, with its configuration files beside it."""
    (folder / "study").mkdir(exist_ok=True)
    base, teacher = tiny_tree(folder / "unused"), tiny_tree(folder / "unused", name="mean_teacher")
    (folder / "study" / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "study" / "teacher.yaml").write_text(yaml.safe_dump(teacher))
    tree = {"output": str(folder / "out"), "config": "base.yaml", "seeds": [0, 1], "axes": AXES} | changes
    path = folder / "study" / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False, default_style='"'))  # 1e-4 stays text
    return path


def finish(sweep: Sweep, score: Callable[[str], float] = lambda name: 40.0, *, but: int = 0) -> None:
    """Makes up all runs of `sweep` but the last `but`."""
    for run in sweep.runs[: len(sweep.runs) - but]:
        write_made_up_run(run.config, {3: score(run.name) + 5, 6: score(run.name)})
