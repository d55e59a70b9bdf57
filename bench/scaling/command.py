"""The cost of training on several processes: by formula, measured here, and on simulated networks.

    python -m bench scaling --table
    python -m bench scaling --processes 1,2,4
    python -m bench scaling --simulate
    python -m bench scaling --json RESULT.json
    python -m bench scaling --plot RESULT.json --out DIR

Without --table, --processes or --simulate it does all three.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

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
    bytes_text,
    shape_of,
    table,
)
from prcl_fast.config import load_config
from prcl_fast.console import check_known, print_table

KIND = "bench.scaling 1"
PROCESSES = (1, 2, 4, 8, 16, 64, 256, 1024)
MEASURED = ("1", "2", "4")  # numbers of processes that divide the measured batch
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

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def main(arguments: Sequence[str]) -> None:
    """`python -m bench scaling`."""
    app(arguments, prog_name="python -m bench scaling")


@app.command()
def scaling_command(
    paper: Annotated[bool, typer.Option("--table", help="A step at VOC size, by formula.")] = False,
    processes: Annotated[
        str | None, typer.Option(metavar="N,N,..", help=f"Measure on this machine; of {', '.join(MEASURED)}.")
    ] = None,
    simulated: Annotated[
        bool, typer.Option("--simulate", help="One process of many, on simulated networks.")
    ] = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="File for the result.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the figure of a result.")] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="With --plot: folder of the figure.")] = Path("."),
) -> None:
    """Bytes and time of a training step on several processes: by formula, measured, and simulated."""
    if plot is not None:
        from bench.scaling.plot import write_figure  # a machine that only measures may lack matplotlib

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
        result["measured"] = [
            measure(count) for count in _announced("measuring {} processes", map(int, named))
        ]
        result["contrast"] = measure_contrast(shape)
    if simulated or everything:
        counts = _announced("simulating {} processes", SIMULATED)
        result["simulated"] = [row for count in counts for row in simulate(count)]
    if json is not None:
        write_result(result, json)
    _print(result)


def _announced(text: str, counts: Iterable[int]) -> Iterator[int]:
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
            sizes = f"gives {bytes_text(sums['gives'])}, sends {bytes_text(sums['sends'])}"
            print(
                f"contrast of {contrast['classes']} classes, D = {contrast['dim']}, 2 processes: "
                f"{purpose} {sums['calls']} x, {sizes}"
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
        cells.append([str(row["processes"]), images, *map(bytes_text, numbers)])
    title = "on paper, VOC: bytes that each process sends, and receives, in a step"
    print_table(title, _PAPER_COLUMNS, cells, right=range(len(_PAPER_COLUMNS)))
    names = [network.name for network in NETWORKS]
    print_table(
        "on paper, VOC: ms of all collectives / of the exposed ones; then the same with gathering",
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
                bytes_text(sum(entry["sends"] for entry in sums)),
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


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
