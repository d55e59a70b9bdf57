"""What training on several processes costs: on paper, measured on this machine, and on simulated networks.

    python -m bench.scaling --table
    python -m bench.scaling --processes 1,2,4
    python -m bench.scaling --simulate
    python -m bench.scaling --json RESULT.json
    python -m bench.scaling --plot RESULT.json --out DIR

    scaling_traffic.py   what crosses in a step, and its time by formula
    scaling_run.py       training on processes that count what crosses, and on one that stands for many

Without --table, --processes or --simulate it does all three.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from bench.packages import needed

with needed("bench.scaling" if __name__ == "__main__" else None):
    import torch
    import typer
    from matplotlib.axes import Axes
    from matplotlib.ticker import NullLocator

    from bench import machine
    from bench.ops.run import read_result, write_result
    from bench.scaling.run import measure, measure_contrast, simulate
    from bench.scaling.traffic import (
        GRADIENTS,
        NETWORKS,
        NORM_BACKWARD,
        NORM_FORWARD,
        PURPOSES,
        STATISTICS,
        shape_of,
        table,
    )
    from prcl_fast.analysis.style import BLUE, GREEN, GREY, ORANGE, RED, new_figure, save_figure, styled
    from prcl_fast.config import load_config
    from prcl_fast.console import check_known, print_table
    from prcl_fast.errors import InputError

KIND = "bench.scaling 1"
PROCESSES = (1, 2, 4, 8, 16, 64, 256, 1024)
MEASURED = ("1", "2", "4")  # what the measured batch can be shared out to
SIMULATED = (1, 2, 8, 64, 256, 1024)
_VOC, _VOC_CLASSES = Path(__file__).resolve().parents[2] / "configs/voc/base.yaml", 21
_NORM = (NORM_FORWARD, NORM_BACKWARD)
_PAPER_COLUMNS = (
    "processes", "images of one", GRADIENTS, NORM_FORWARD, NORM_BACKWARD, STATISTICS, "other",
    "gathering instead", "images read",
)  # fmt: skip
_MEASURED_COLUMNS = (
    "processes", "step, ms", "20 to 80 %", "collectives", "sends", "waits", "for gradients", "for batch norm",
)  # fmt: skip


def scaling_command(
    paper: Annotated[bool, typer.Option("--table", help="A step at VOC size by formula.")] = False,
    processes: Annotated[
        str | None, typer.Option(metavar="N,N,..", help=f"Measure here, of {', '.join(MEASURED)}.")
    ] = None,
    simulated: Annotated[
        bool, typer.Option("--simulate", help="One process among many, on networks by formula.")
    ] = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result there.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the figure of a result.")] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="With --plot: where to.")] = Path("."),
) -> None:
    """What training on several processes costs."""
    if plot is not None:
        print(write_figure(read_result(plot, KIND), out / f"{plot.stem}.png"))
        return
    everything = not (paper or processes or simulated)
    named = [name.strip() for name in processes.split(",")] if processes else everything * MEASURED
    check_known("--processes", named, MEASURED)
    shape = shape_of(load_config(_VOC, ["model.weights=null"]), _VOC_CLASSES)
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "kind": KIND,
        "machine": machine.describe("cpu"),
        "options": {"load_before": os.getloadavg()[0]},
    }
    if paper or everything:
        result["paper"] = table(shape, PROCESSES)
    if named:
        result["measured"] = [measure(count) for count in _told("measuring on {} processes", map(int, named))]
        result["contrast"] = measure_contrast(shape)
    if simulated or everything:
        counts = _told("simulating {} processes", SIMULATED)
        result["simulated"] = [row for count in counts for row in simulate(count)]
    if json is not None:
        write_result(result, json)
    _print(result)


def _told(text: str, counts: Iterable[int]) -> Iterator[int]:
    for count in counts:
        print(text.format(count), file=sys.stderr, flush=True)
        yield count


def _print(result: Mapping[str, Any]) -> None:
    where = result["machine"]
    print(
        f"{where['device']}, PyTorch {where['torch']}, {where['commit']}; load of the machine before: "
        f"{result['options']['load_before']:.2f} on {where['cores']} cores"
    )
    if "paper" in result:
        _print_paper(result["paper"])
    if "measured" in result:
        _print_measured(result["measured"])
        contrast = result["contrast"]
        for purpose, sums in contrast["collectives"].items():
            print(
                f"contrast of {contrast['classes']} classes, D = {contrast['dim']}, 2 processes: "
                f"{purpose} {sums['calls']} x, gives {_bytes(sums['gives'])}, sends {_bytes(sums['sends'])}"
            )
    if "simulated" in result:
        names = [network.name for network in NETWORKS]
        rows = result["simulated"]
        print_table(
            "simulated: milliseconds of a step, ours / with features gathered",
            ["processes", "no delay", *names],
            [
                [str(count), *(_pair(rows, count, name) for name in (None, *names))]
                for count in sorted({row["processes"] for row in rows})
            ],
            right=range(5),
        )


def _print_paper(rows: Sequence[Mapping[str, Any]]) -> None:
    shown = (GRADIENTS, NORM_FORWARD, NORM_BACKWARD, STATISTICS)
    cells = []
    for row in rows:
        sent = row["sent_bytes"]
        other = sum(sent[purpose] for purpose in PURPOSES if purpose not in shown)
        numbers = (*(sent[purpose] for purpose in shown), other, row["gathering_bytes"], row["read_bytes"])
        images = "{} + {}".format(*row["images_of_a_process"])
        cells.append([str(row["processes"]), images, *map(_bytes, numbers)])
    title = "on paper, VOC: bytes that each process sends, and receives, in a step"
    print_table(title, _PAPER_COLUMNS, cells, right=range(len(_PAPER_COLUMNS)))
    names = [network.name for network in NETWORKS]
    print_table(
        "on paper, VOC: milliseconds of all collectives / of those that nothing hides; so with gathering",
        ["processes", "collectives", *names],
        [
            [str(row["processes"]), str(row["collectives"]), *(_times(row["ms"][n]) for n in names)]
            for row in rows
        ],
        right=range(5),
    )


def _print_measured(rows: Sequence[Mapping[str, Any]]) -> None:
    cells = []
    for row in rows:
        sums, waited = row["collectives"].values(), row["waited_ms"]
        norm = sum(waited.get(purpose, 0.0) for purpose in _NORM)
        cells.append(
            [
                str(row["processes"]),
                _number(row["ms"]),
                f"{row['ms_20']:.0f} to {row['ms_80']:.0f}",
                str(sum(entry["calls"] for entry in sums)),
                _bytes(sum(entry["sends"] for entry in sums)),
                f"{100 * row['waited_share']:.0f} %",
                f"{_number(waited.get(GRADIENTS, 0.0))} ms",
                f"{_number(norm)} ms",
            ]
        )
    title = f"measured: steps of {rows[0]['images']} images in all, on processes of one thread each, gloo"
    print_table(title, _MEASURED_COLUMNS, cells, right=range(len(_MEASURED_COLUMNS)))


def _times(ms: Mapping[str, float]) -> str:
    ours, gathered = (("all", "exposed"), ("gathering", "gathering, exposed"))
    return "; ".join(" / ".join(_number(ms[key]) for key in keys) for keys in (ours, gathered))


def _pair(rows: Sequence[Mapping[str, Any]], count: int, network: str | None) -> str:
    found = [row["ms"] for row in rows if (row["processes"], row["network"]) == (count, network)]
    return " / ".join(map(_number, found))


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def write_figure(result: Mapping[str, Any], path: Path) -> Path:
    """Bytes and time of a step by formula, and simulated steps. Raises InputError."""
    if not ("paper" in result and "simulated" in result):
        raise InputError(f"{path.stem}: holds no table or no simulation; measure without naming parts")
    where, rows = result["machine"], [row for row in result["paper"] if row["processes"] > 1]
    with styled():
        figure = new_figure(12.5, 4.4)
        figure.suptitle(
            "Training on N processes. Left and middle: a VOC step on paper. Right: a small step of one "
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
        exposed.set_title("ms of a step that nothing hides, by formula")
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
        "batch norm": (GREEN, [sum(purposes[p] for p in _NORM) for purposes in sent]),
        "prototype statistics": (BLUE, [purposes[STATISTICS] for purposes in sent]),
    }
    for name, (colour, values) in lines.items():
        axes.plot(counts, values, "o-", markersize=3, color=colour, label=name)
    axes.set(title="bytes that a process sends in a step", ylim=(1e4, 1e13))
    axes.legend(loc="upper left", ncol=2)
    _log_axes(axes, counts)
    axes.yaxis.set_major_formatter(lambda value, _: _bytes(value))


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


def main() -> None:
    """The command; a mistake in the input is one line and status 2."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(scaling_command)
    try:
        app()
    except InputError as error:
        print(f"bench.scaling: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
