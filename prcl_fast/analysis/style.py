"""Style of all figures. Without pyplot, so that no global state changes and no display is needed."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import EngFormatter, MaxNLocator

from prcl_fast.files.writing import replacing

# Okabe and Ito's colours, distinct for colour-blind readers.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
# Colours of a series, in this order.
COLOURS = (BLUE, RED, GREEN, ORANGE, "#CC79A7", "#56B4E9", GREY, "#000000")

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.constrained_layout.use": True,
}
# Fonts with many scripts, for names that the first font of the list, matplotlib's own, cannot show.
_FURTHER_FONTS = (
    *(f"Noto Sans CJK {region}" for region in ("SC", "TC", "JP", "KR")),
    *(
        "Noto Sans SC",
        "Source Han Sans SC",
        "WenQuanYi Zen Hei",
        "WenQuanYi Micro Hei",
        "Droid Sans Fallback",
    ),
    *("Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans", "Malgun Gothic", "Arial Unicode MS"),
    *("Noto Sans Arabic", "Noto Sans Devanagari", "Noto Sans Thai"),
)


@contextmanager
def styled() -> Iterator[None]:
    """Applies the style to figures drawn and saved inside."""
    with matplotlib.rc_context(_STYLE | {"font.family": ["sans-serif", *_installed_fonts()]}), _quiet():
        yield


def plain_text(name: str) -> str:
    """A name of the user's, to be drawn as it is: neither as a formula nor left out of the legend."""
    shown = name.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


@functools.cache
def _installed_fonts() -> tuple[str, ...]:
    installed = {font.name for font in fontManager.ttflist}
    return tuple(name for name in _FURTHER_FONTS if name in installed)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a warning for each character that no installed font has; it is drawn as a box."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def iteration_axis(axes: Axes, last: int) -> None:
    """Iterations along x, from 0 to `last`: few ticks, thousands as 5k."""
    axes.set_xlabel("iteration")
    axes.set_xlim(0, 1.02 * last)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def legend_above(axes: Axes, columns: int) -> None:
    """A legend between title and axes, where it hides no data."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncol=columns,
        borderpad=0.2,
        borderaxespad=0.0,
        columnspacing=1.2,
        handlelength=1.4,
    )


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG of 150 dpi atomically. Raises WriteError."""
    with replacing(path) as file, _quiet():
        figure.savefig(file, format="png", dpi=150, bbox_inches="tight", pad_inches=0.08)
