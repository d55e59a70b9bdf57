"""Curves over the iterations of a run: losses, contrast, mIoU, and statistics of the representation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prcl_fast.analysis.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    iteration_axis,
    legend_above,
    new_figure,
    styled,
)
from prcl_fast.runs.metrics import Metrics, series

Records = Sequence[Mapping[str, Any]]


def draw_curves(metrics: Metrics) -> Figure:
    """Loss terms, contrast with its chance level, and mIoU. Parts that the run did not log are left out."""
    parts: list[Callable[[Axes], None]] = []
    if _has(metrics.train, "loss"):
        parts.append(lambda axes: _draw_losses(axes, metrics.train))
    if _has(metrics.train, "loss_contrast"):
        parts.append(lambda axes: _draw_contrast(axes, metrics.train))
    if _has(metrics.evaluations, "miou"):
        parts.append(lambda axes: _draw_miou(axes, metrics.evaluations))
    return _row(parts, metrics)


def draw_representation(metrics: Metrics) -> Figure | None:
    """Mean and standard deviation of sigma^2 and mu, figure 3a of the AAAI paper; None if not logged.

    With a probability head also the AUROC of sigma^2 and of the confidence as detectors of wrong pixels.
    """
    parts: list[Callable[[Axes], None]] = []
    for key, title, label, colour in (
        ("variance", "Variance", r"$\sigma^2$", BLUE),
        ("mu", "Mean", r"$\mu$", GREEN),
    ):
        if _has(metrics.train, f"{key}_mean") and _has(metrics.train, f"{key}_std"):
            parts.append(_spread(metrics.train, key, f"{title} of the representation", label, colour))
    if parts and _has(metrics.evaluations, "variance_auroc"):
        parts.append(lambda axes: _draw_auroc(axes, metrics.evaluations))
    return _row(parts, metrics) if parts else None


def _row(parts: Sequence[Callable[[Axes], None]], metrics: Metrics) -> Figure:
    last = max(record["iteration"] for record in (*metrics.train, *metrics.evaluations))
    with styled():
        figure = new_figure(4.2 * len(parts), 3.3)
        all_axes = figure.subplots(1, len(parts), squeeze=False)[0]
        for axes, draw in zip(all_axes, parts, strict=True):
            draw(axes)
            iteration_axis(axes, last)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.06)  # type: ignore[union-attr, call-arg]
        # Ticks and texts take their style when they are drawn.
        figure.canvas.draw()
    return figure


def _draw_losses(axes: Axes, records: Records) -> None:
    terms = [("loss_supervised", r"labeled $L_s$", BLUE), ("loss_unsupervised", r"unlabeled $L_u$", ORANGE)]
    terms = [term for term in terms if _has(records, term[0])]
    if len(terms) != 1:
        terms = [("loss", r"total $L$", GREY), *terms]
    for key, label, colour in terms:
        _line(axes, records, key, label, colour)
    axes.set_title("Loss", pad=22)
    axes.set_ylabel("loss, nats")
    axes.set_ylim(bottom=0)
    legend_above(axes, len(terms))


def _draw_contrast(axes: Axes, records: Records) -> None:
    _line(axes, records, "loss_contrast", r"contrast $L_c$", RED)
    iterations, chance = series(records, "chance")
    if len(chance):
        axes.plot(iterations, chance, "--", color=GREY, linewidth=1.2, label="chance level")
    axes.set_title("Contrastive loss", pad=22)
    axes.set_ylabel("loss, nats")
    axes.set_ylim(bottom=0)
    legend_above(axes, 2)


def _draw_miou(axes: Axes, records: Records) -> None:
    main, student = series(records, "miou"), series(records, "miou_student")
    curves = [("teacher", BLUE, main), ("student", ORANGE, student)]
    if np.array_equal(main[1], student[1]) or not len(student[1]):
        curves = [("student", ORANGE, main)]  # a method without a teacher evaluates its student
    for name, colour, (iterations, values) in curves:
        best = int(values.argmax())
        label = f"{name}, best {values[best]:.1f}"
        axes.plot(iterations, values, "-o", color=colour, linewidth=1.4, markersize=2.5, label=label)
        axes.plot(iterations[best], values[best], "o", color=colour, markersize=6)
    axes.set_title("Validation mIoU", pad=22)
    axes.set_ylabel("mIoU, %")
    legend_above(axes, 2)


def _draw_auroc(axes: Axes, records: Records) -> None:
    for key, name, colour in (
        ("variance_auroc", r"$\sigma^2$, teacher", BLUE),
        ("variance_auroc_student", r"$\sigma^2$, student", ORANGE),
        ("confidence_auroc", "1 - confidence", GREEN),
    ):
        iterations, values = series(records, key)
        axes.plot(iterations, values, "-o", color=colour, linewidth=1.4, markersize=2.5, label=name)
    axes.axhline(0.5, linestyle="--", color=GREY, linewidth=1.2)  # the chance level
    axes.set_title("Detection of wrong pixels", pad=22)
    axes.set_ylabel("AUROC")
    legend_above(axes, 3)


def _spread(records: Records, key: str, title: str, symbol: str, colour: str) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        keys = (f"{key}_mean", f"{key}_std")
        complete = [record for record in records if all(record.get(key) is not None for key in keys)]
        (iterations, mean), (_, deviation) = (series(complete, key) for key in keys)
        low, high = mean - deviation, mean + deviation
        axes.plot(iterations, mean, color=colour, linewidth=1.5, label="mean")
        axes.fill_between(
            iterations, low, high, color=colour, alpha=0.2, linewidth=0, label="± 1 standard deviation"
        )
        axes.set_title(title, pad=22)
        axes.set_ylabel(f"{symbol} over pixels and dimensions")
        legend_above(axes, 2)

    return draw


def _line(axes: Axes, records: Records, key: str, label: str, colour: str) -> None:
    """The logged values; if they are many, pale, with their running mean."""
    iterations, values = series(records, key)
    width = len(values) // 40
    if width > 1:
        axes.plot(iterations, values, color=colour, linewidth=0.7, alpha=0.25)
        values = running_mean(values, width)
    marker = "o" if len(values) < 10 else ""
    axes.plot(iterations, values, marker=marker, markersize=3, color=colour, linewidth=1.5, label=label)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` neighbours (rounded up to odd), fewer at the ends: [n] -> [n]."""
    window = np.ones(width // 2 * 2 + 1)
    sums = np.convolve(values, window)[len(window) // 2 :][: len(values)]
    counts = np.convolve(np.ones_like(values), window)[len(window) // 2 :][: len(values)]
    return sums / counts


def _has(records: Records, key: str) -> bool:
    return any(record.get(key) is not None for record in records)
