"""Figures of a representation space: t-SNE (IJCV figures 6 and 9) and prototypes over time (figure 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from prcl_fast.analysis.cluster_quality import normalized
from prcl_fast.analysis.style import RED, iteration_axis, new_figure, plain_text, styled

MIN_POINTS = 10  # t-SNE preserves neighbourhoods, which fewer points do not have
_PERPLEXITY = 30.0
_LEGEND_ROW = 0.2  # inches


@dataclass(frozen=True, eq=False)
class Space:
    """P pixels of C classes, their prototypes and virtual negatives."""

    classes: Sequence[str]
    palette: np.ndarray  # uint8 [C, 3]
    representation: np.ndarray  # [P, D]
    group: np.ndarray  # int [P]
    by: str  # meaning of `group`, such as "true class"
    prototypes: np.ndarray  # [C, K, D], nan for a class without prototypes
    virtual: np.ndarray | None  # [C, V, D], nan for a class without virtual negatives
    variance: np.ndarray | None  # [P], mean of sigma^2 over the dimensions
    wrong: np.ndarray | None  # bool [P], predicted wrongly; None if the truth is not known


def perplexity_of(points: int) -> float:
    """30, or less for few points: t-SNE uses about three times as many neighbours."""
    return min(_PERPLEXITY, (points - 1) / 3)


def draw_tsne(space: Space, seed: int) -> Figure:
    """t-SNE of L2-normalised vectors: pixels, prototypes (stars) and virtual negatives (crosses) together.

    With a variance, a second plot shows the same points coloured by it, with wrong predictions ringed.
    """
    classes, per_class, dim = space.prototypes.shape
    virtual = np.empty((classes, 0, dim)) if space.virtual is None else space.virtual
    everything = [space.representation, space.prototypes.reshape(-1, dim), virtual.reshape(-1, dim)]
    points = normalized(np.concatenate(everything))
    known = ~np.isnan(points).any(axis=1)
    placed = np.full((len(points), 2), np.nan)
    placed[known] = TSNE(
        init="pca", random_state=seed, perplexity=perplexity_of(int(known.sum()))
    ).fit_transform(points[known])
    pixels, stars, crosses = np.split(placed, np.cumsum([len(part) for part in everything])[:2])
    with styled():
        columns = 1 if space.variance is None else 2
        figure, legend = _figure(5.2 * columns, 4.5, space, virtual.shape[1] > 0)
        axes = figure.subplots(1, columns, squeeze=False)[0]
        _bare(axes[0], f"t-SNE of pixels, by {space.by}", placed)
        colours = space.palette / 255.0
        axes[0].scatter(pixels[:, 0], pixels[:, 1], s=7, c=colours[space.group], alpha=0.7, linewidths=0)
        owners = np.repeat(np.arange(classes), virtual.shape[1])
        _stars(axes[0], stars, np.repeat(colours, per_class, axis=0))
        _crosses(axes[0], crosses, colours[owners])
        if space.variance is not None:
            _bare(axes[1], r"The same, by variance $\sigma^2$", placed)
            _draw_variance(figure, axes[1], pixels, space.variance, space.wrong)
        figure.legend(handles=legend, loc="outside lower center", ncol=_per_row(5.2 * columns))
        figure.canvas.draw()
    return figure


def draw_prototypes(
    space: Space, iterations: Sequence[int], paths: np.ndarray, shift: tuple[np.ndarray, np.ndarray] | None
) -> Figure:
    """Prototypes of each class at several checkpoints, and their logged shift.

    The projection is the PCA of the L2-normalised drawn pixels and prototypes.

    Args:
        iterations: of the checkpoints, ascending.
        paths: [len(iterations), C, K, D], prototypes, nan for a class without; the last ones are stars.
        shift: logged iterations [n] and distances [n, C], nan if not known; None without a log.
    """
    pixels, path = normalized(space.representation), normalized(paths)
    known = path[~np.isnan(path).any(axis=3)]
    pca = PCA(2, svd_solver="full").fit(np.concatenate([pixels, known]))
    share = 100 * pca.explained_variance_ratio_
    background = pca.transform(pixels)
    colours = space.palette / 255.0
    with styled():
        columns = 1 if shift is None else 2
        figure, legend = _figure(5.2 * columns, 4.8, space, False)
        axes = figure.subplots(1, columns, squeeze=False)[0]
        first = axes[0]
        first.set_title(_path_title(iterations))
        first.set_xlabel(f"first principal component, {share[0]:.0f} % of the variance")
        first.set_ylabel(f"second, {share[1]:.0f} %")
        first.scatter(
            background[:, 0], background[:, 1], s=4, c=colours[space.group], alpha=0.25, linewidths=0
        )
        for index, number in np.ndindex(path.shape[1:3]):
            places, colour = path[:, index, number], colours[index]
            places = places[~np.isnan(places).any(axis=1)]
            if len(places):
                places = pca.transform(places)
                first.plot(*places.T, "-o", color=colour, markersize=4, mec="black", mew=0.5, linewidth=1.4)
                _stars(first, places[-1:], colour[None])
        if shift is not None:
            _draw_shift(axes[1], *shift, colours)
        figure.legend(handles=legend, loc="outside lower center", ncol=_per_row(5.2 * columns))
        figure.canvas.draw()
    return figure


def _path_title(iterations: Sequence[int]) -> str:
    if len(iterations) == 1:
        return f"Prototypes at iteration {iterations[0]}"
    return (
        f"Prototypes at {len(iterations)} checkpoints, iteration {iterations[0]} to {iterations[-1]} (star)"
    )


def _draw_variance(
    figure: Figure, axes: Axes, pixels: np.ndarray, variance: np.ndarray, wrong: np.ndarray | None
) -> None:
    low, high = np.percentile(variance, [1, 99])  # outliers would take up the colour range
    drawn = axes.scatter(
        pixels[:, 0], pixels[:, 1], s=7, c=variance, cmap="viridis", vmin=low, vmax=high, linewidths=0
    )
    bar = figure.colorbar(drawn, ax=axes, aspect=40, pad=0.02, shrink=0.8)
    bar.set_label(r"$\sigma^2$, mean over dimensions")
    bar.outline.set_visible(False)  # type: ignore[operator]
    if wrong is not None:
        axes.set_title(
            rf"The same, by variance $\sigma^2$; ringed: predicted wrongly ({100 * wrong.mean():.0f} %)"
        )
        axes.scatter(
            pixels[wrong, 0], pixels[wrong, 1], s=18, facecolors="none", edgecolors=RED, linewidths=0.35
        )


def _draw_shift(axes: Axes, iterations: np.ndarray, distances: np.ndarray, colours: np.ndarray) -> None:
    axes.set_title("Logged shift of each prototype")
    axes.set_ylabel("distance of L2-normalised means")
    for values, colour in zip(distances.T, colours, strict=True):
        axes.plot(iterations, values, color=colour, linewidth=1.2)
    axes.set_ylim(bottom=0)
    iteration_axis(axes, int(iterations.max()))


def _figure(width: float, height: float, space: Space, virtual: bool) -> tuple[Figure, list[Line2D]]:
    """A figure with room for its legend, and the legend's entries."""
    present = np.union1d(space.group, np.flatnonzero(~np.isnan(space.prototypes).any(axis=(1, 2))))
    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            marker="o",
            color=space.palette[index] / 255.0,
            label=plain_text(space.classes[index]),
        )
        for index in present
    ]
    signs = [("prototype", "*", 11, "black")]
    if virtual:
        signs.append(("virtual negative", "X", 7, "white"))
    for label, marker, size, edge in signs:
        handles.append(
            Line2D(
                [],
                [],
                linestyle="",
                marker=marker,
                markersize=size,
                color="0.5",
                markeredgecolor=edge,
                label=label,
            )
        )
    rows = -(-len(handles) // _per_row(width))
    return new_figure(width, height + _LEGEND_ROW * rows), handles


def _per_row(width: float) -> int:
    return max(1, int(width / 1.25))


def _bare(axes: Axes, title: str, points: np.ndarray) -> None:
    """A square around all points, without ticks, because t-SNE's axes have no meaning."""
    axes.set_title(title)
    low, high = np.nanmin(points, axis=0), np.nanmax(points, axis=0)
    (x, y), half = (low + high) / 2, 0.53 * (high - low).max()
    axes.set_xlim(x - half, x + half)
    axes.set_ylim(y - half, y + half)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_aspect("equal")


def _stars(axes: Axes, places: np.ndarray, colours: np.ndarray) -> None:
    x, y = places.T
    axes.scatter(x, y, s=190, c=colours, marker="*", edgecolors="black", linewidths=0.9, zorder=3)


def _crosses(axes: Axes, places: np.ndarray, colours: np.ndarray) -> None:
    # Above the stars: the virtual negatives of a certain class lie close to its prototype.
    x, y = places.T
    axes.scatter(x, y, s=30, c=colours, marker="X", edgecolors="white", linewidths=0.6, zorder=4)
