"""The whole training step against the published algorithm and against plain PyTorch.

    python -m bench step --size small --candidates published,eager,ours train.threads=2
    python -m bench step --config FILE KEY=VALUE ...
    python -m bench step --plot RESULT.json --out DIR

A time is the wall time of consecutive steps between two synchronisations. It includes fetching the images.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.ops.run import read_result, write_result
from bench.step.data import SIZES, file_config, size_config
from bench.step.run import KIND, PUBLISHED_SECONDS, Plan, measure
from bench.step.worker import CANDIDATES
from prcl_fast.console import check_known, print_table
from prcl_fast.device import choose_device, prepare_device

# In the order of the rows.
_DEFAULT = {
    "cpu": ("published", "eager", "ours"),
    "cuda": (
        *("published", "eager", "compile"),
        *("ours", "ours-graph", "ours-compile", "ours-graph-compile", "ours-shared16"),
    ),
}
_COLUMNS = (
    "candidate", "median ms", "20 to 80 %", "vs published", "vs eager", "images/s", "contrast %", "busy %",
    "peak MB", "note",
)  # fmt: skip


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def main(arguments: Sequence[str]) -> None:
    """`python -m bench step`."""
    # An exit, unlike the signal's default, ends the candidates' processes and removes the images.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    app(arguments, prog_name="python -m bench step")


@app.command()
def step_command(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes of the configuration, for all candidates."),
    ] = None,
    size: Annotated[str, typer.Option(help=f"{', '.join(SIZES)}.")] = "small",
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Configuration file, not a size.")
    ] = None,
    candidates: Annotated[str | None, typer.Option(help=f"Of {', '.join(CANDIDATES)}.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed turns of each candidate.")] = 16,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of a turn; 1 on the CPU and 10 on CUDA by default.")
    ] = None,
    one_at_a_time: Annotated[
        bool,
        typer.Option(
            "--one-at-a-time",
            help="Keep one candidate in memory at a time: each makes half of its rounds, then all start "
            "again; `published` runs last and once. Always on for CUDA, and with data workers.",
        ),
    ] = False,
    published_seconds: Annotated[
        float,
        typer.Option(min=0, help="With one candidate at a time: seconds of timing `published`."),
    ] = PUBLISHED_SECONDS,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File for the result, written after each candidate.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the figures of a result.")] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="With --plot: folder of the figures.")] = Path("."),
) -> None:
    """Time the training step of PRCL: the published one, plain PyTorch, and this package's.

    Exit status 1: a candidate could not run.
    """
    if plot is not None:
        # Imported here, because a machine that only measures may lack matplotlib.
        from bench.step.plot import write_figures

        for path in write_figures(read_result(plot, KIND), out, plot.stem):
            print(path)
        return
    check_known("--size", [size], SIZES)
    names = None if candidates is None else [name.strip() for name in candidates.split(",")]
    check_known("--candidates", names or (), CANDIDATES)
    with tempfile.TemporaryDirectory(prefix="prcl_step_") as folder:
        place = Path(folder)
        if config is None:
            chosen = size_config(size, place, overrides or ())
        else:
            chosen = file_config(config, place, overrides or ())
        device = choose_device(chosen.train.device)
        prepare_device(device, threads=chosen.train.threads, tf32=chosen.train.tf32)
        on_cuda = device.type == "cuda"
        plan = Plan(
            title=size if config is None else config.stem,
            config=chosen,
            device=device.type,
            candidates=tuple(names or _DEFAULT[device.type]),
            rounds=rounds,
            steps=steps or (10 if on_cuda else 1),
            # The first steps set libraries up and use images that workers prepared in advance.
            warmup=2 * chosen.data.workers + (5 if on_cuda else 2),
            one_at_a_time=one_at_a_time or on_cuda or chosen.data.workers > 0,
            published_seconds=published_seconds,
        )

        def finished(result: Mapping[str, Any]) -> None:
            if json is not None:
                write_result(result, json)

        result = measure(plan, lambda text: print(text, file=sys.stderr, flush=True), finished)
    _print(result)
    if any(row["ms"] is None for row in result["rows"]):
        raise typer.Exit(1)


def _print(result: Mapping[str, Any]) -> None:
    machine, options = result["machine"], result["options"]
    print(
        f"{machine['device']}, {machine['threads']} threads, PyTorch {machine['torch']}, "
        f"{machine['commit']}; load of the machine before: {options['load_before']:.2f} "
        f"on {machine['cores']} cores"
    )
    times = {row["candidate"]: row["ms"] for row in result["rows"]}
    print_table(
        f"{options['title']}: {options['what']}",
        _COLUMNS,
        [_cells(row, times) for row in result["rows"]],
        right=range(1, 9),
    )
    for line in result["same_for_all"]:
        print(f"  {line}")


def _cells(row: Mapping[str, Any], times: Mapping[str, float | None]) -> list[str]:
    if row["ms"] is None:
        return [row["candidate"], *[""] * 8, row["note"]]

    def ratio(other: str) -> str:
        before = times.get(other)
        return "" if before is None else f"{before / row['ms']:.2f}x"

    return [
        row["candidate"],
        f"{row['ms']:.1f}",
        f"{row['ms_20']:.1f} to {row['ms_80']:.1f}",
        ratio("published"),
        ratio("eager"),
        f"{row['images_per_second']:.1f}",
        _share_of_contrast(row["parts_ms"]),
        "" if row["busy"] is None else f"{100 * row['busy']:.0f}",
        f"{row['peak_bytes'] / 1e6:.0f}",
        row["note"],
    ]


def _share_of_contrast(parts: Mapping[str, float]) -> str:
    return f"{100 * parts['contrast'] / sum(parts.values()):.1f}" if parts else ""
