"""The figure of a sweep's table: lines over a numeric axis, or all cells sorted by their means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from matplotlib.transforms import ScaledTranslation

from prcl_fast.analysis.seed_statistics import Summary
from prcl_fast.analysis.style import COLOURS, new_figure, plain_text, styled

# With more groups than colours, colours repeat with another marker.
MARKERS = "os^DvPX"
# Lines are shifted sideways so that error bars do not overlap: points (1/72 inch) between two, and in all.
_SHIFT, _LARGEST_SHIFT = 5.0, 24.0
_LARGE_RANGE = 6.0  # ratio of largest and smallest number from which the axis is logarithmic


def draw_sweep(axes: Sequence[str], means: Mapping[tuple[str, ...], Summary]) -> Figure:
    """The figure of a sweep.

    Args:
        axes: their names; the entries of the first are the rows.
        means: mIoU in % by the entries of all axes, at least one cell.
    """
    numeric = min(1, len(axes) - 1)
    if len({cell[numeric] for cell in means}) > 1 and all(_is_number(cell[numeric]) for cell in means):
        return _lines(axes, numeric, means)
    return _sorted_dots(means)


def _lines(axes: Sequence[str], numeric: int, means: Mapping[tuple[str, ...], Summary]) -> Figure:
    """One line for the entries of all axes but the `numeric` one."""
    lines: dict[str, dict[float, Summary]] = {}
    for cell, summary in means.items():
        label = ", ".join(name for index, name in enumerate(cell) if index != numeric)
        lines.setdefault(label, {})[float(cell[numeric])] = summary
    with styled():
        figure = new_figure(6.2, 3.6 + 0.1 * max(0, len(lines) - 8))
        plot = figure.subplots()
        step = min(_SHIFT, _LARGEST_SHIFT / len(lines))
        for index, (label, points) in enumerate(lines.items()):
            aside = (index - (len(lines) - 1) / 2) * step / 72
            numbers = sorted(points)
            summaries = [points[number] for number in numbers]
            bars = plot.errorbar(
                numbers,
                [summary.mean for summary in summaries],
                yerr=[summary.std or 0.0 for summary in summaries],
                marker=MARKERS[index // len(COLOURS) % len(MARKERS)],
                color=COLOURS[index % len(COLOURS)],
                linewidth=1.5,
                markersize=4.5,
                capsize=2.5,
                label=plain_text(label),
            )
            for artist in bars.get_children():
                shift = ScaledTranslation(aside, 0, figure.dpi_scale_trans)
                artist.set_transform(artist.get_transform() + shift)
        _number_axis(plot, {cell[numeric] for cell in means})
        plot.set_xlabel(plain_text(axes[numeric]))
        plot.set_ylabel("mIoU, %")
        plot.set_title(_miou_label(means))
        plot.margins(y=0.12)
        if len(lines) > 1:
            # In the order of the lines at their right ends.
            ends = [points[max(points)].mean for points in lines.values()]
            handles = [
                handle
                for _, handle in sorted(zip(ends, plot.containers, strict=True), key=lambda pair: pair[0])
            ]
            title = ", ".join(axis for index, axis in enumerate(axes) if index != numeric)
            figure.legend(
                handles=handles[::-1], loc="outside right center", title=plain_text(title), alignment="left"
            )
        figure.canvas.draw()
    return figure


def _number_axis(plot: Axes, names: set[str]) -> None:
    """Ticks at the entries, labelled as in the sweep file."""
    numbers = sorted(names, key=float)
    low, high = float(numbers[0]), float(numbers[-1])
    if low > 0 and high / low >= _LARGE_RANGE:
        plot.set_xscale("log")
    plot.set_xticks([float(name) for name in numbers], numbers)
    plot.xaxis.set_minor_locator(NullLocator())


def _sorted_dots(means: Mapping[tuple[str, ...], Summary]) -> Figure:
    """All cells sorted by mean, the best on top, in one colour for each row of the table."""
    cells = sorted(means, key=lambda cell: means[cell].mean)
    rows = list(dict.fromkeys(cell[0] for cell in means))
    with styled():
        figure = new_figure(5.4, 0.9 + 0.3 * len(cells))
        plot = figure.subplots()
        for height, cell in enumerate(cells):
            summary = means[cell]
            index = rows.index(cell[0]) if len(cells) > len(rows) else 0
            plot.errorbar(
                summary.mean,
                height,
                xerr=summary.std or 0.0,
                marker=MARKERS[index // len(COLOURS) % len(MARKERS)],
                color=COLOURS[index % len(COLOURS)],
                markersize=6,
                capsize=3,
            )
            right = summary.mean + (summary.std or 0.0)
            plot.annotate(
                str(summary), (right, height), (7, 0), textcoords="offset points", va="center", fontsize=8.5
            )
        plot.set_yticks(range(len(cells)), [plain_text(", ".join(cell)) for cell in cells])
        plot.set_ylim(-0.6, len(cells) - 0.4)
        plot.grid(visible=False, axis="y")
        plot.margins(x=0.25)
        plot.set_xlabel(_miou_label(means))
        figure.canvas.draw()
    return figure


def _miou_label(means: Mapping[tuple[str, ...], Summary]) -> str:
    seeds = max(summary.n for summary in means.values())
    spread = f", mean ± standard deviation of {seeds} seeds" if seeds > 1 else ""
    return f"Validation mIoU, %{spread}"


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False
