"""`prcl profile CONFIG [key.path=value ...]`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prcl_fast.cli.arguments import ConfigFile, Overrides
from prcl_fast.console import note, print_table, say
from prcl_fast.files.json_text import json_text

if TYPE_CHECKING:
    from prcl_fast.config import Config
    from prcl_fast.planning.decode_cost import DecodeCost
    from prcl_fast.planning.step_profile import Profile


def profile_command(
    config: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=2, help="Number of timed steps.")] = 20,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for profile.json, step_time.png and trace.json.gz."),
    ] = None,
) -> None:
    """Measure the time of each part of a training step.

    On a GPU also its memory. Nothing is written into the run's output. The trace opens in
    https://ui.perfetto.dev and in chrome://tracing.
    """
    from prcl_fast.config import load_config
    from prcl_fast.files.locking import locked_folder

    loaded = load_config(config, overrides or [])
    with contextlib.nullcontext() if out is None else locked_folder(out, "--out"):
        _profile(loaded, config.stem, steps, out)


def _profile(loaded: Config, title: str, steps: int, out: Path | None) -> None:
    from prcl_fast.analysis.step_time import draw_step_time
    from prcl_fast.analysis.style import save_figure
    from prcl_fast.files.writing import write_text
    from prcl_fast.planning.step_profile import profile

    trace = None if out is None else out / "trace.json.gz"
    found = profile(loaded, steps, trace=trace, say=note)
    _print(found)
    _print_decoding(found.decoding, loaded, found.step_ms)
    if out is not None:
        write_text(out / "profile.json", json_text(found.plain(), indent=1) + "\n")
        save_figure(draw_step_time({title: found.parts_ms}), out / "step_time.png")
        note(f"written: {out}/profile.json, step_time.png, trace.json.gz")


def _print(found: Profile) -> None:
    whole = sum(found.parts_ms.values())
    rows = []
    for name, milliseconds in found.parts_ms.items():
        row = [name, f"{milliseconds:.2f}", f"{100 * milliseconds / whole:.1f}"]
        if found.peak_bytes:
            row.append(f"{found.peak_bytes[name] / 1e6:.0f}" if name in found.peak_bytes else "")
        rows.append(row)
    rows.append(["step, part by part", f"{whole:.2f}", "100.0", *([""] if found.peak_bytes else [])])
    title = f"{found.device}, {found.threads} threads, PyTorch {found.torch}, {found.images} images a step"
    columns = ["part", "ms", "%", *(["peak MB"] if found.peak_bytes else [])]
    print_table(title, columns, rows, right=(1, 2, 3))
    how = "captured as a graph" if found.graph else "as it trains"
    say(
        f"step, {how}: {found.step_ms:.1f} ms ({found.step_ms_20:.1f} to {found.step_ms_80:.1f}), "
        f"{1e3 * found.images / found.step_ms:.1f} images/s; {100 * found.busy:.0f} % busy, "
        f"{100 * (1 - found.busy):.0f} % idle; peak resident memory {found.resident_bytes / 1e6:.0f} MB"
    )


def _print_decoding(cost: DecodeCost, config: Config, step_ms: float) -> None:
    from prcl_fast.planning.decode_cost import workers_needed

    shown = [
        f"{name} {subset.milliseconds:.2f} ms an image"
        for name, subset in (("labeled", cost.labeled), ("unlabeled", cost.unlabeled))
        if subset is not None
    ]
    images = {"labeled": config.train.batch_labeled}
    if config.method.name != "supervised":
        images["unlabeled"] = config.train.batch_unlabeled
    needed = workers_needed(cost, images, step_ms / 1e3)
    say(
        f"decoding: {', '.join(shown)}; data.workers={needed} keeps up with this step, or data.cache, "
        f"which decodes once; configured: workers {config.data.workers}, cache {config.data.cache}"
    )
