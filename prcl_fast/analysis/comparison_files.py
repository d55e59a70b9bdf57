"""Files of a comparison: compare.md, .csv, .json, and .png with the curves of the validation mIoU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from prcl_fast.analysis.comparison import Comparison, Group
from prcl_fast.analysis.seed_statistics import csv_table, markdown_table
from prcl_fast.analysis.style import COLOURS, iteration_axis, new_figure, plain_text, save_figure, styled
from prcl_fast.files.json_text import json_text
from prcl_fast.files.locking import locked_folder
from prcl_fast.files.writing import write_text
from prcl_fast.machine.description import provenance
from prcl_fast.runs.metrics import series
from prcl_fast.runs.provenance import read_records

_RESULTS = ("miou", "miou_student", "best_miou", "iteration", "seconds")
_DASHES = ("-", "--", "-.", ":")


def write_comparison(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Writes the files into `folder`; the figure only if a run was evaluated. Raises InputError."""
    with locked_folder(Path(folder), "out"):
        return _write(comparison, Path(folder))


def _write(comparison: Comparison, folder: Path) -> list[Path]:
    texts = {
        "compare.md": _markdown(comparison),
        "compare.csv": _csv(comparison),
        "compare.json": _json(comparison),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    paths = [folder / name for name in texts]
    if any(group.summary("miou") is not None for group in comparison.groups):
        save_figure(draw_comparison(comparison), folder / "compare.png")
        paths.append(folder / "compare.png")
    return paths


def draw_comparison(comparison: Comparison) -> Figure:
    """Validation mIoU over iterations: the mean of each group in a band of one standard deviation."""
    with styled():
        groups = len(comparison.groups)
        figure = new_figure(6.0, 3.8 + 0.17 * groups)
        axes = figure.subplots()
        last = 1
        for index, group in enumerate(comparison.groups):
            iterations, mean, deviation = _curve(group)
            if not len(iterations):
                continue
            last = max(last, int(iterations[-1]))
            colour = COLOURS[index % len(COLOURS)]
            label = plain_text(f"{comparison.label(index)}: {group.summary('miou')}")
            dash = _DASHES[index // len(COLOURS) % len(_DASHES)]
            marker = "o" if len(iterations) < 30 else ""
            axes.plot(
                iterations, mean, dash, marker=marker, markersize=3, color=colour, linewidth=1.5, label=label
            )
            axes.fill_between(
                iterations, mean - deviation, mean + deviation, color=colour, alpha=0.18, linewidth=0
            )
        several = any(len(group.runs) > 1 for group in comparison.groups)
        axes.set_title("Validation mIoU" + (", mean ± standard deviation over seeds" if several else ""))
        axes.set_ylabel("mIoU, %")
        iteration_axis(axes, last)
        figure.legend(loc="outside lower left")
        figure.canvas.draw()
    return figure


def _curve(group: Group) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Iterations at which all evaluated runs have a value, their mean and standard deviation: [n] each."""
    curves = []
    for run in group.runs:
        iterations, values = series(run.result.evaluations, "miou")
        if len(iterations):
            curves.append(dict(zip(iterations.tolist(), values.tolist(), strict=True)))
    shared = sorted(set.intersection(*map(set, curves))) if curves else []
    table = np.array([[curve[iteration] for iteration in shared] for curve in curves]).reshape(
        len(curves), -1
    )
    if not shared:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    deviation = table.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros(len(shared))
    return np.array(shared), table.mean(axis=0), deviation


def _markdown(comparison: Comparison) -> str:
    parts = ["Validation mIoU in %, mean ± sample standard deviation over seeds.\n"]
    parts += [f"Warning: {warning}.\n" for warning in comparison.warnings]
    parts.append(markdown_table(comparison.header(), comparison.rows(), names=len(comparison.columns)))
    return "\n".join(parts)


def _csv(comparison: Comparison) -> str:
    rows = []
    for index, group in enumerate(comparison.groups):
        texts = [comparison.columns[name][index] for name in comparison.columns]
        for run in group.runs:
            results = [getattr(run.result, key) for key in _RESULTS]
            rows.append([*texts, run.config.seed, *results, str(run.folder)])
    return csv_table([*comparison.columns, "seed", *_RESULTS, "run"], rows)


def _json(comparison: Comparison) -> str:
    groups = []
    for index, group in enumerate(comparison.groups):
        summaries: dict[str, Any] = {}
        for key in ("miou", "best_miou", "seconds"):
            summary = group.summary(key)
            summaries[key] = None if summary is None else dataclasses.asdict(summary)
        runs = [
            {
                "run": str(run.folder),
                "seed": run.config.seed,
                "iterations": run.config.train.iterations,
                **{key: getattr(run.result, key) for key in _RESULTS},
                "starts": read_records(run.folder),
            }
            for run in group.runs
        ]
        shown = {name: texts[index] for name, texts in comparison.columns.items()}
        groups.append({"settings": shown, **summaries, "runs": runs})
    tree = {"groups": groups, "warnings": list(comparison.warnings)} | provenance()
    return json_text(tree, indent=1) + "\n"
