"""The figure of a result of `bench scaling`: bytes and times of a step over the number of processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from bench.scaling.traffic import GRADIENTS, NETWORKS, NORM_BACKWARD, NORM_FORWARD, STATISTICS, bytes_text
from prcl_fast.analysis.style import BLUE, GREEN, GREY, ORANGE, RED, new_figure, save_figure, styled
from prcl_fast.errors import InputError


def write_figure(result: Mapping[str, Any], path: Path) -> Path:
    """Bytes and time of a step by formula, and simulated steps. Raises InputError."""
    if not ("paper" in result and "simulated" in result):
        raise InputError(f"{path.stem}: holds no table or no simulation; measure without naming parts")
    where, rows = result["machine"], [row for row in result["paper"] if row["processes"] > 1]
    with styled():
        figure = new_figure(12.5, 4.4)
        figure.suptitle(
            "Training on N processes. Left and middle: a VOC step by formula. Right: a small step of one "
            f"process,\none thread, with the delays of N ({where['device']}, {where['commit']})",
            fontsize=10, x=0.01, ha="left",
        )  # fmt: skip
        sent, exposed, simulated = figure.subplots(1, 3)
        _draw_bytes(sent, rows)
        _draw_networks(
            exposed,
            {n.name: [(row["processes"], row["ms"][n.name]["exposed"]) for row in rows] for n in NETWORKS},
            {
                n.name: [(r["processes"], r["ms"][n.name]["gathering, exposed"]) for r in rows]
                for n in NETWORKS
            },
        )
        exposed.set_title("exposed ms of a step, by formula")
        _draw_networks(
            simulated,
            {n.name: _simulated(result["simulated"], n.name, "ours") for n in NETWORKS},
            {n.name: _simulated(result["simulated"], n.name, "gathering") for n in NETWORKS},
        )
        free = _simulated(result["simulated"], None, "ours")
        simulated.plot(*zip(*free, strict=True), ":", color=GREY, label="no delay")
        _log_axes(simulated, [count for count, _ in free])
        simulated.set(title="ms of a simulated step", yscale="linear", ylim=(0, None))
        handles, labels = simulated.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncol=4)
        save_figure(figure, path)
    return path


def _simulated(rows: Sequence[Mapping[str, Any]], network: str | None, what: str) -> list[tuple[int, float]]:
    return [(row["processes"], row["ms"]) for row in rows if (row["network"], row["what"]) == (network, what)]


def _draw_bytes(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    counts = [row["processes"] for row in rows]
    sent = [row["sent_bytes"] for row in rows]
    lines = {
        "features, gathered": (RED, [row["gathering_bytes"] for row in rows]),
        "gradients": (GREY, [purposes[GRADIENTS] for purposes in sent]),
        "batch norm": (GREEN, [sum(purposes[p] for p in (NORM_FORWARD, NORM_BACKWARD)) for purposes in sent]),
        "prototype statistics": (BLUE, [purposes[STATISTICS] for purposes in sent]),
    }
    for name, (colour, values) in lines.items():
        axes.plot(counts, values, "o-", markersize=3, color=colour, label=name)
    axes.set(title="bytes sent by a process in a step", ylim=(1e4, 1e13))
    axes.legend(loc="upper left", ncol=2)
    _log_axes(axes, counts)
    axes.yaxis.set_major_formatter(lambda value, _: bytes_text(value))


def _draw_networks(
    axes: Axes,
    ours: Mapping[str, Sequence[tuple[int, float]]],
    gathering: Mapping[str, Sequence[tuple[int, float]]],
) -> None:
    for way, style, lines in (("ours", "o-", ours), ("features gathered", "o--", gathering)):
        for (name, points), colour in zip(lines.items(), (GREEN, BLUE, ORANGE), strict=True):
            counts, values = zip(*points, strict=True)
            label = f"{name.split(',')[0]}, {way}"
            axes.plot(counts, values, style, markersize=3, color=colour, label=label)
    _log_axes(axes, counts)
    axes.yaxis.set_major_formatter("{x:g}")


def _log_axes(axes: Axes, counts: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("processes")
