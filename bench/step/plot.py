"""Figures of a result of `bench step`: time and memory of every candidate, and the parts of its step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from prcl_fast.analysis.step_time import draw_step_time
from prcl_fast.analysis.style import BLUE, GREY, ORANGE, RED, new_figure, save_figure, styled
from prcl_fast.errors import InputError

_COLOURS = {"published": GREY, "eager": ORANGE, "eager-bf16": ORANGE, "compile": RED}  # ours: BLUE
_BAR_INCHES = 0.3


def write_figures(result: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    """Writes <stem>.png and <stem>_parts.png. Raises InputError: no measured time, or not writable."""
    rows = [row for row in result["rows"] if row["ms"] is not None]
    if not rows:
        raise InputError(f"{stem}: holds no measured time")
    path, parts = folder / f"{stem}.png", folder / f"{stem}_parts.png"
    machine, options = result["machine"], result["options"]
    threads = f", {machine['threads']} threads" if machine["device_type"] == "cpu" else ""
    with styled():
        figure = new_figure(8.6, 1.2 + _BAR_INCHES * len(rows))
        figure.suptitle(
            f"Training step, {options['title']}: {options['what']}\n"
            f"{machine['device']}{threads}, {machine['commit']}",
            fontsize=10, x=0.01, ha="left",
        )  # fmt: skip
        time, memory = figure.subplots(1, 2, sharey=True)
        slowest = rows[0]["ms"]
        texts = [f"{_milliseconds(row['ms'])}, {slowest / row['ms']:.2f}x" for row in rows]
        _bars(time, rows, [row["ms"] for row in rows], texts)
        time.set_xlabel(f"milliseconds a step (median); x: against {rows[0]['candidate']}")
        peaks = [row["peak_bytes"] / 1e9 for row in rows]
        _bars(memory, rows, peaks, [f"{peak:.3g} GB" for peak in peaks])
        of = "process" if machine["device_type"] == "cpu" else "GPU's tensors"
        memory.set_xlabel(f"peak memory of the {of}, GB")
        memory.tick_params(labelleft=False)
        save_figure(figure, path)
    known = {row["candidate"]: row["parts_ms"] for row in rows if row["parts_ms"]}
    save_figure(draw_step_time(known), parts)
    return [path, parts]


def _milliseconds(value: float) -> str:
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _bars(axes: Axes, rows: list[Mapping[str, Any]], values: list[float], texts: list[str]) -> None:
    names = [row["candidate"] for row in rows]
    axes.barh(range(len(rows)), values, height=0.75, color=[_COLOURS.get(name, BLUE) for name in names])
    for position, (value, text) in enumerate(zip(values, texts, strict=True)):
        axes.text(value, position, f" {text}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), names)
    axes.set(xlim=(0, 1.45 * max(values)), ylim=(len(rows) - 0.5, -0.5))
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
