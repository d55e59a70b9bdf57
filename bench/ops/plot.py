"""Figures of a result: roofline, and times of all candidates."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.ops.run import RESULT_DIFFERS, Row, label
from prcl_fast.analysis.style import BLUE, GREEN, GREY, ORANGE, RED, new_figure, save_figure, styled
from prcl_fast.errors import InputError

# Okabe and Ito's colours. Each bar also has its candidate's name.
_COLOURS = {
    "loop": GREY,
    "eager": ORANGE,
    "compile": RED,
    "torch": "#CC79A7",
    "native": BLUE,
    "native-shared16": "#56B4E9",
    "triton": GREEN,
    "triton-shared16": "#F0E442",
}
_OURS = ("native", "triton")
_BAR_INCHES = 0.19
_DISC_WIDTH, _DISC_HEIGHT = 0.055, 0.06  # of the axes


def write_figures(result: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    """Writes <stem>_roofline.png and <stem>_times.png; returns their paths.

    Raises:
        InputError: the result holds no time, or the folder cannot be written.
    """
    groups = _groups(result)
    if not groups:
        raise InputError(f"{stem}: holds no measured time")
    paths = [folder / f"{stem}_roofline.png", folder / f"{stem}_times.png"]
    with styled():
        for path, draw in zip(paths, (_roofline, _times), strict=True):
            save_figure(draw(result, groups), path)
    return paths


def _groups(result: Mapping[str, Any]) -> dict[str, list[Row]]:
    """The rows of each op with a time and a correct result: forward with backward if both exist."""
    groups: dict[str, list[Row]] = {}
    for row in result["rows"]:
        if row["ms"] is not None and row["direction"] != "backward" and row["note"] != RESULT_DIFFERS:
            groups.setdefault(label(row), []).append(row)
    for name, rows in groups.items():
        last = "both" if any(row["direction"] == "both" for row in rows) else "forward"
        groups[name] = [row for row in rows if row["direction"] == last]
    return groups


def _title(result: Mapping[str, Any]) -> str:
    machine, options = result["machine"], result["options"]
    threads = f", {machine['threads']} threads" if machine["device_type"] == "cpu" else ""
    return f"{machine['device']}{threads}, {options['size']}, {options['dtype']}, {machine['commit']}"


def _roofline(result: Mapping[str, Any], groups: Mapping[str, list[Row]]) -> Figure:
    """The roofline of the ops, without the contrast, which is their sum, and without shared negatives."""
    figure = new_figure(8.6, 4.4)
    axes = figure.add_subplot()
    ceilings = result["ceilings"]
    gather, arithmetic = max(ceilings["gather_gb_s"].values()), ceilings["multiply_adds_g_s"]
    points: list[tuple[str, float, float, str]] = []
    ops = {name: rows for name, rows in groups.items() if rows[0]["op"] != "contrast"}
    for letter, (name, rows) in zip(string.ascii_lowercase, ops.items(), strict=False):
        best = min((row for row in rows if row["candidate"] in _OURS), key=_ms, default=None)
        eager = next((row for row in rows if row["candidate"] == "eager"), None)
        drawn = [(row, colour) for row, colour in ((eager, ORANGE), (best, BLUE)) if row is not None]
        points += [(letter, *_point(row), colour) for row, colour in drawn]
        reached = (
            f": {best['candidate']}, floor is {100 * best['floor_share']:.0f} % of the time" if best else ""
        )
        axes.plot([], [], " ", label=f"{letter}  {name}{reached}")
    intensities = [arithmetic / ceilings["copy_gb_s"], *(x for _, x, _, _ in points)]
    intensity = np.geomspace(min(intensities) / 3, 5 * max(intensities), 300)
    for bandwidth, style, what in (
        (ceilings["copy_gb_s"], "-", "copy"),
        (gather, "--", f"gather of {ceilings['gather_row_bytes']}-byte rows"),
    ):
        ceiling = np.minimum(bandwidth * intensity, arithmetic)
        text = f"{what} {bandwidth:.0f} GB/s, {arithmetic:.0f} G multiply-adds/s"
        axes.plot(intensity, ceiling, style, color=GREY, linewidth=1.2, label=text)
    axes.set(xscale="log", yscale="log", xlim=(intensity[0], intensity[-1]))
    axes.set_ylim(min([arithmetic / 100, *(y for _, _, y, _ in points)]) / 3, 3 * arithmetic)
    _draw_points(axes, points)
    axes.plot([], [], "o", color=BLUE, markersize=9, label="fastest backend of prcl_fast")
    axes.plot([], [], "o", color=ORANGE, markersize=9, label="eager PyTorch")
    axes.set_xlabel("instructions per byte that must be moved")
    axes.set_ylabel("G instructions/s")
    axes.set_title(f"Roofline: {_title(result)}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.6)
    return figure


def _draw_points(axes: Axes, points: Sequence[tuple[str, float, float, str]]) -> None:
    """Draws a disc with its letter at each point; an overlapping one is moved right and tied by a line."""
    placed: list[tuple[float, float]] = []
    to_axes = axes.transData + axes.transAxes.inverted()
    for letter, x, y, colour in points:
        left, height = to_axes.transform((x, y))
        place = left
        while any(abs(place - u) < _DISC_WIDTH and abs(height - v) < _DISC_HEIGHT for u, v in placed):
            place += _DISC_WIDTH / 4
        placed.append((place, height))
        where: dict[str, Any] = {"transform": axes.transAxes, "zorder": 3}
        axes.plot([left, place], [height, height], color=colour, linewidth=1.0, **where)
        axes.plot(place, height, "o", color=colour, markersize=13, markeredgecolor="white", **where)
        axes.text(place, height, letter, color="white", ha="center", va="center", fontsize=9, **where)


def _point(row: Row) -> tuple[float, float]:
    moved = row["bytes_streamed"] + row["bytes_gathered"]
    return row["instructions"] / moved, row["instructions"] / row["ms"] / 1e6


def _times(result: Mapping[str, Any], groups: Mapping[str, list[Row]]) -> Figure:
    bars = sum(len(rows) + 1.4 for rows in groups.values())
    figure = new_figure(8.0, 0.9 + _BAR_INCHES * bars)
    axes = figure.add_subplot()
    every = [row["ms"] for rows in groups.values() for row in rows]
    floors = [row["floor_ms"] for rows in groups.values() for row in rows]
    left, right = min(every + floors) / 2, max(every) * 6  # room for the numbers beside the bars
    axes.set(xscale="log", xlim=(left, right), ylim=(bars, -0.4))
    axes.grid(False, axis="y")
    y, ticks = 0.0, []
    for name, rows in groups.items():
        what = "forward + backward" if rows[0]["direction"] == "both" else "forward"
        axes.text(left, y, f" {name}, {what}", fontweight="bold", va="center", fontsize=8.5)
        y += 1.0
        for row in sorted(rows, key=_ms, reverse=True):
            axes.barh(y, row["ms"] - left, left=left, height=0.8, color=_COLOURS[row["candidate"]])
            axes.plot([row["floor_ms"]] * 2, [y - 0.4, y + 0.4], color="black", linewidth=1.4)
            axes.text(row["ms"] * 1.08, y, _milliseconds(row["ms"]), va="center", fontsize=7.5)
            ticks.append((y, row["candidate"]))
            y += 1.0
        y += 0.4
    axes.set_yticks([tick for tick, _ in ticks], [text for _, text in ticks], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("milliseconds (median); black: the floor")
    axes.set_title(_title(result))
    return figure


def _ms(row: Row) -> float:
    return row["ms"]


def _milliseconds(value: float) -> str:
    if value < 0.1:
        return f"{value * 1e3:.0f} µs"
    return f"{value / 1e3:.1f} s" if value >= 1e3 else f"{value:.3g} ms"
