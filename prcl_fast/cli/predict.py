"""`prcl predict RUN_OR_CHECKPOINT IMAGES... --out DIR [key.path=value ...]`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from prcl_fast.cli.arguments import Device, NetworkName, RunOrCheckpoint
from prcl_fast.console import note
from prcl_fast.errors import InputError

_OVERRIDABLE = ("eval.", "data.max_pixels=", "train.amp=", "train.threads=")
_OVERRIDE = re.compile(r"(data|model|method|optim|train|eval)\.[\w.]+=")


def predict_command(
    run: RunOrCheckpoint,
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGES... [KEY.PATH=VALUE]...",
            help="Image files, and folders of image files with their subfolders; then values of eval.*, "
            "data.max_pixels, train.amp or train.threads that replace the run's.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write into.")],
    network: NetworkName = None,
    device: Device = "auto",
    raw: Annotated[
        bool, typer.Option("--raw", help="Also write sigma^2 as NAME_variance.npy, float32.")
    ] = False,
) -> None:
    """Segment images at their original size.

    Writes NAME.png (class ids), NAME_overlay.png and, with a probability head, NAME_variance.png; images of
    subfolders into the same subfolders of the output folder. An image that cannot be read is named at the
    end, and the exit status is 1.
    """
    from dataclasses import replace

    from prcl_fast.config import override_config
    from prcl_fast.device import prepare_device
    from prcl_fast.engine.predict import Unreadable, check_all_predicted, predict_files
    from prcl_fast.engine.predict_inputs import find_images
    from prcl_fast.processes.session import session
    from prcl_fast.runs.checkpoint import load_run

    with session("predict", lambda: _overrides_and_paths(images), lambda _: device) as here:
        overrides, paths = here.loaded
        inputs = find_images(paths)
        loaded = load_run(run, here.device)
        if overrides:
            loaded = replace(loaded, config=override_config(loaded.config, overrides))
        train = loaded.config.train
        prepare_device(here.device, threads=train.threads, tf32=train.tf32)
        say = here.console.print
        passed_over = inputs.passed_over_line()
        if passed_over is not None:
            say(passed_over)
        unreadable: list[Unreadable] = []
        for found in predict_files(loaded, network, inputs, out, here.device, raw=raw):
            if isinstance(found, Unreadable):
                unreadable.append(found)
                continue
            line = f"{found.image} -> {', '.join(str(file.relative_to(out)) for file in found.files)}"
            if found.variance_range is not None:
                low, high = found.variance_range
                line += f"; variance {low:.4g} (dark blue) to {high:.4g} (yellow)"
            say(line)
        say(f"predictions are in {out}")
        for image in unreadable:  # on every rank: each knows its own
            note(f"prcl: {image.reason}")
        check_all_predicted(len(unreadable), inputs, here.device)


def _overrides_and_paths(arguments: Sequence[Path]) -> tuple[list[str], list[Path]]:
    overrides = [str(argument) for argument in arguments if _OVERRIDE.match(str(argument))]
    for override in overrides:
        if not override.startswith(_OVERRIDABLE):
            raise InputError(
                f"override {override!r}: predict takes eval.*, data.max_pixels, train.amp and train.threads; "
                "the run determines the other settings"
            )
    return overrides, [argument for argument in arguments if not _OVERRIDE.match(str(argument))]
