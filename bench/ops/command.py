"""Benchmarks of the ops: run, compare and draw.

python -m bench ops [OP ...] [--size voc] [--json FILE]
python -m bench ops --compare A B [--bound 1.1]
python -m bench ops --plot FILE ... --out DIR
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.ops import CANDIDATES, DTYPES, LABELS, OPS, SIZES
from bench.ops.case import Options
from bench.ops.compare import differences, pairs
from bench.ops.run import broken_rows, label, read_result, run, write_result
from prcl_fast.console import check_known, print_table
from prcl_fast.console.plain import PlainConsole
from prcl_fast.device import choose_device
from prcl_fast.errors import InputError

_COLUMNS = (
    "direction", "candidate", "median ms", "20 to 80 %", "vs eager", "vs loop", "of the floor", "peak MB",
    "retained MB", "error", "note",
)  # fmt: skip


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def main(arguments: Sequence[str]) -> None:
    """`python -m bench ops`."""
    app(arguments, prog_name="python -m bench ops")


@app.command()
def ops_command(
    what: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OP]...", help="Ops, all by default; with --plot: result files."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; on CUDA bfloat16 by default.")
    ] = None,
    size: Annotated[str, typer.Option(help="small, voc or cityscapes.")] = "small",
    labels: Annotated[str, typer.Option(help="coherent, as in VOC, or uniform.")] = "coherent",
    rounds: Annotated[
        int, typer.Option(min=1, help="Timed calls of each candidate; fewer for slow ones.")
    ] = 15,
    candidates: Annotated[
        str | None,
        typer.Option(
            help="Such as eager,native. All by default, except compile at size small, which takes minutes."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch on the CPU.")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="File for the result.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A B", help="Compare result B with result A.")
    ] = None,
    bound: Annotated[float, typer.Option(help="With --compare: largest ratio of times, B to A.")] = 1.1,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the figures of result files.")] = False,
    out: Annotated[Path, typer.Option(metavar="DIR", help="With --plot: folder of the figures.")] = Path("."),
) -> None:
    """Measure the ops against plain PyTorch and the published algorithm: time, memory, error to float64.

    Times are wall times on the CPU, and device times with a flushed L2 on CUDA.

    Exit status 1: an op fails or its error exceeds its bound, or --compare finds a ratio above --bound.
    """
    if compare is not None:
        _compare(*compare, bound)
    elif plot:
        _plot([Path(name) for name in what or ()], out)
    else:
        _run(what or (), device, dtype, size, labels, rounds, candidates, threads, json)


def _run(
    ops: Sequence[str],
    device: str,
    dtype: str | None,
    size: str,
    labels: str,
    rounds: int,
    candidates: str | None,
    threads: int | None,
    json: Path | None,
) -> None:
    chosen_device = choose_device(device)
    kind = chosen_device.type
    dtype = dtype or ("bfloat16" if kind == "cuda" else "float32")
    default = [name for name in CANDIDATES if size != "small" or name != "compile"]
    chosen = default if candidates is None else [name.strip() for name in candidates.split(",")]
    for key, values, known in (
        ("op", ops, OPS),
        ("--size", [size], SIZES),
        ("--labels", [labels], LABELS),
        ("--dtype", [dtype], DTYPES),
        ("--candidates", chosen, CANDIDATES),
    ):
        check_known(key, values, known)
    if threads is not None:
        torch.set_num_threads(threads)
    if kind == "cuda":
        torch.cuda.set_device(chosen_device)

    def write(result: Mapping[str, Any]) -> None:
        if json is not None:
            write_result(result, json)

    options = Options(size, kind, getattr(torch, dtype), labels)
    with _progress() as progress:
        wanted = [name for name in OPS if not ops or name in ops]
        result = run(wanted, options, rounds, chosen, progress=progress, finished=write)
    _print(result)
    broken = broken_rows(result)
    for row in broken:
        what = row["note"]
        if not row["broken"]:
            what = f"error {row['error']:.2g} where {row['error_bound']:.2g} is allowed"
        name = f"{row['op']} {row['variant']} {row['direction']} {row['candidate']}"
        print(f"bench ops: {' '.join(name.split())}: {what}", file=sys.stderr)
    if broken:
        raise typer.Exit(1)


def _compare(before: Path, after: Path, bound: float) -> None:
    if not bound > 0:
        raise InputError(f"--bound: must be positive; got {bound}")
    results = read_result(before), read_result(after)
    found = pairs(*results)
    for line in differences(*results):
        print(f"bench ops: the machines differ in {line}", file=sys.stderr)
    rows = []
    for pair in found:
        time = "does not run" if pair.after is None else _number(pair.after)
        mark = "slower" if pair.ratio > bound else "faster" if pair.ratio < 1 / bound else ""
        rows.append((pair.name, _number(pair.before), time, f"{pair.ratio:.3f}", mark))
    print_table(f"{after} against {before}", ("row", "A ms", "B ms", "B / A", ""), rows, right=(1, 2, 3))
    slower = [pair.name for pair in found if pair.ratio > bound]
    for name in slower:
        print(f"bench ops: slower than {bound:g} times: {name}", file=sys.stderr)
    if slower:
        raise typer.Exit(1)


def _plot(files: Sequence[Path], out: Path) -> None:
    from bench.ops.plot import write_figures  # a machine that only measures may lack matplotlib

    if not files:
        raise InputError("--plot: name at least one result file")
    for file in files:
        for path in write_figures(read_result(file), out, file.stem):
            print(path)


def _print(result: Mapping[str, Any]) -> None:
    """One table an op and variant."""
    machine, ceilings = result["machine"], result["ceilings"]
    gathers = ", ".join(f"{rate:.0f} ({pool})" for pool, rate in ceilings["gather_gb_s"].items())
    print(
        f"{machine['device']}, {machine['threads']} threads, PyTorch {machine['torch']}, "
        f"{machine['commit']}; GB/s: copy {ceilings['copy_gb_s']:.0f}, "
        f"rows of {ceilings['gather_row_bytes']} bytes {gathers}; "
        f"{ceilings['multiply_adds_g_s']:.0f} G multiply-adds/s"
    )
    titles = dict.fromkeys((label(row), row["shape"], row["dtype"]) for row in result["rows"])
    for title in titles:
        own = [row for row in result["rows"] if (label(row), row["shape"], row["dtype"]) == title]
        rows = []
        for row in own:
            beside = {x["candidate"]: x["ms"] for x in own if x["direction"] == row["direction"]}
            if row["ms"] is not None:
                rows.append(_cells(row, beside))
        print_table(", ".join(title), _COLUMNS, rows, right=range(2, 10))
        for line in dict.fromkeys(f"{x['candidate']}: {x['note']}" for x in own if x["ms"] is None):
            print(f"  {line}")


def _cells(row: Mapping[str, Any], beside: Mapping[str, float | None]) -> list[str]:
    def times(other: str) -> str:
        return f"{beside[other] / row['ms']:.2f}x" if beside.get(other) else ""

    def megabytes(value: int | None) -> str:
        return "" if value is None else f"{value / 1e6:.1f}"

    return [
        row["direction"],
        row["candidate"],
        _number(row["ms"]),
        f"{_number(row['ms_20'])} to {_number(row['ms_80'])}",
        times("eager"),
        times("loop"),
        f"{100 * row['floor_share']:.0f} %",
        megabytes(row["peak_bytes"]),
        megabytes(row["retained_bytes"]),
        "" if row["error"] is None else f"{row['error']:.1e}",
        row["note"],
    ]


def _number(value: float) -> str:
    """Three digits, four above a hundred."""
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f}"


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Progress on standard error: one changing line on a terminal, else a line for each step."""
    console = PlainConsole(stderr=True)
    if not console.is_terminal:
        yield lambda text: print(text, file=sys.stderr, flush=True)
        return
    with console.status("") as status:
        yield status.update
