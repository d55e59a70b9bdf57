"""Panel of images with truth, pseudo-label, prediction and variance, figure 3b of the AAAI paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from prcl_fast.analysis.style import new_figure, plain_text, styled
from prcl_fast.data.source import IGNORE

_IGNORED_COLOUR = (190, 190, 190)
_PALE = 0.82  # fraction of white over pseudo-labels that are not confident
_WIDTH, _LEGEND_ROW = 2.4, 0.24  # inches


@dataclass(frozen=True, eq=False)
class PanelRow:
    """One image. Fields that the method does not have are None, in all rows."""

    name: str
    image: np.ndarray  # uint8 [H, W, 3]
    truth: np.ndarray  # uint8 [H, W], 255 = not labeled
    prediction: np.ndarray  # uint8 [H, W]
    pseudo_label: np.ndarray | None  # uint8 [H, W]
    confidence: np.ndarray | None  # float32 [H, W], of the pseudo-label
    variance: np.ndarray | None  # float32 [H, W]


def draw_panel(
    rows: Sequence[PanelRow], classes: Sequence[str], palette: np.ndarray, delta_u: float | None
) -> Figure:
    """The figure of the rows.

    Args:
        rows: at least one.
        palette: uint8 [C, 3].
        delta_u: pseudo-labels of at most this confidence are pale, eq. (14); None without pseudo-labels.
    """
    first = rows[0]
    columns = ["Image", "Truth"]
    if first.pseudo_label is not None:
        columns.append("Pseudo-label (teacher)")
    columns.append("Prediction (student)")
    if first.variance is not None:
        columns.append(r"Variance $\sigma^2$ (student)")
    seen = sorted(set().union(*(_ids(row) for row in rows)))
    handles = [
        Patch(
            facecolor="#{:02x}{:02x}{:02x}".format(*_colour(index, palette)),
            edgecolor="#888888",
            linewidth=0.4,
            label="not labeled" if index == IGNORE else plain_text(classes[index]),
        )
        for index in seen
    ]
    heights = [_WIDTH * min(1.0, row.image.shape[0] / row.image.shape[1]) for row in rows]
    width = _WIDTH * len(columns) + (0 if first.variance is None else 0.8)
    per_row = max(1, int(width / 1.3))
    height = sum(heights) + 0.28 * len(rows) + 0.4 + _LEGEND_ROW * -(-len(handles) // per_row)
    with styled():
        figure = new_figure(width, height)
        figure.set_layout_engine("compressed", w_pad=0.03, h_pad=0.03, hspace=0, wspace=0)
        grid = figure.subplots(len(rows), len(columns), squeeze=False, height_ratios=heights)
        scale = _variance_scale(rows)
        for row, line in zip(rows, grid, strict=True):
            _draw_row(row, line, palette, delta_u, scale)
        for axes, title in zip(grid[0], columns, strict=True):
            axes.set_title(title, loc="center")
        if scale is not None:
            bar = figure.colorbar(
                ScalarMappable(scale, "viridis"), ax=grid[:, -1].tolist(), aspect=40, pad=0.02, shrink=0.8
            )
            bar.set_label(r"$\sigma^2$, mean over dimensions")
            bar.outline.set_visible(False)  # type: ignore[operator]
        figure.legend(
            handles=handles, loc="outside lower center", ncol=min(per_row, len(handles)), borderpad=0.8
        )
        figure.canvas.draw()
    return figure


def _draw_row(
    row: PanelRow, line: Sequence[Axes], palette: np.ndarray, delta_u: float | None, scale: Normalize | None
) -> None:
    for axes in line:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)
        axes.spines[:].set_visible(False)
    remaining = iter(line)
    next(remaining).imshow(row.image)
    line[0].set_xlabel(plain_text(row.name), fontsize=8)
    next(remaining).imshow(_coloured(row.truth, palette), interpolation="nearest")
    if row.pseudo_label is not None and row.confidence is not None and delta_u is not None:
        axes = next(remaining)
        confident = row.confidence > delta_u
        axes.imshow(_paled(_coloured(row.pseudo_label, palette), ~confident), interpolation="nearest")
        axes.set_xlabel(f"{100 * confident.mean():.0f}% above {delta_u:g} (rest pale)", fontsize=8)
    next(remaining).imshow(_coloured(row.prediction, palette), interpolation="nearest")
    if row.variance is not None:
        next(remaining).imshow(row.variance, cmap="viridis", norm=scale)


def _variance_scale(rows: Sequence[PanelRow]) -> Normalize | None:
    """One range for all images, without the lowest and highest percent of the values."""
    values = [row.variance.ravel() for row in rows if row.variance is not None]
    if not values:
        return None
    low, high = np.percentile(np.concatenate(values), [1, 99])
    return Normalize(float(low), float(high), clip=True)


def _ids(row: PanelRow) -> set[int]:
    maps = [row.truth, row.prediction] + ([] if row.pseudo_label is None else [row.pseudo_label])
    return {int(index) for ids in maps for index in np.unique(ids)}


def _colour(index: int, palette: np.ndarray) -> tuple[int, ...]:
    return _IGNORED_COLOUR if index == IGNORE else tuple(int(value) for value in palette[index])


def _coloured(ids: np.ndarray, palette: np.ndarray) -> np.ndarray:
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    colours[IGNORE] = _IGNORED_COLOUR
    return colours[ids]


def _paled(colours: np.ndarray, where: np.ndarray) -> np.ndarray:
    pale = np.where(where[..., None], (1 - _PALE) * colours + _PALE * 255, colours)
    return np.rint(pale).astype(np.uint8)
