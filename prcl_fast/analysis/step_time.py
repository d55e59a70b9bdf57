"""Bars of the time of a training step: one for each candidate, with one colour for each part."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from prcl_fast.analysis.style import BLUE, GREEN, ORANGE, RED, new_figure, styled
from prcl_fast.step_parts import PARTS

_COLOURS = dict(
    zip(
        PARTS,
        ("#999999", "#F0E442", "#56B4E9", "#FFB3A7", BLUE, ORANGE, RED, "#004166", GREEN, "#7FD1B9"),
        strict=True,
    )
) | {"other": "#D9D9D9"}
_LEAST_WIDTH = 0.045  # of the longest bar, so that a number fits


def draw_step_time(candidates: Mapping[str, Mapping[str, float]]) -> Figure:
    """Stacked bars.

    Args:
        candidates: by name, milliseconds of each part of the step: PARTS and "other".
    """
    longest = max(sum(parts.values()) for parts in candidates.values())
    with styled():
        figure = new_figure(8.0, 1.5 + 0.45 * len(candidates))
        axes = figure.subplots()
        for name, colour in _COLOURS.items():
            widths = [parts.get(name, 0.0) for parts in candidates.values()]
            if not any(widths):
                continue
            starts = [_before(name, parts) for parts in candidates.values()]
            axes.barh(list(candidates), widths, left=starts, color=colour, label=name, height=0.62)
            for row, (start, width) in enumerate(zip(starts, widths, strict=True)):
                if width > _LEAST_WIDTH * longest:
                    dark = name in ("student", "backward", "contrast", "optimizer")
                    axes.text(
                        start + width / 2, row, f"{width:.0f}", ha="center", va="center", fontsize=7.5,
                        color="white" if dark else "black",
                    )  # fmt: skip
        for row, parts in enumerate(candidates.values()):
            whole = sum(parts.values())
            axes.text(whole + 0.01 * longest, row, f"{whole:.0f} ms", va="center", fontsize=8.5)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 1.12 * longest)
        axes.set_xlabel("milliseconds of a step")
        figure.legend(loc="outside upper left", ncol=6, handlelength=1.0, columnspacing=1.2)
    return figure


def _before(name: str, parts: Mapping[str, float]) -> float:
    names = list(_COLOURS)
    return sum(parts.get(earlier, 0.0) for earlier in names[: names.index(name)])
