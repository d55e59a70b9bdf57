"""`prcl predict RUN_OR_CHECKPOINT IMAGES... --out DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prcl_fast.cli.arguments import Device, NetworkName, RunOrCheckpoint


def predict_command(
    run: RunOrCheckpoint,
    images: Annotated[
        list[Path],
        typer.Argument(help="Image files, and folders of image files (not their subfolders)."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write into.")],
    network: NetworkName = None,
    device: Device = "auto",
    raw: Annotated[
        bool, typer.Option("--raw", help="Also write sigma^2 as NAME_variance.npy, float32.")
    ] = False,
) -> None:
    """Segment images at their original size.

    Writes NAME.png (class ids), NAME_overlay.png and, with a probability head, NAME_variance.png.
    """
    from prcl_fast.device import prepare_device
    from prcl_fast.engine.predict import predict_files
    from prcl_fast.processes.session import session
    from prcl_fast.runs.checkpoint import load_run

    with session(lambda: None, lambda _: device) as here:
        loaded = load_run(run, here.device)
        train = loaded.config.train
        prepare_device(here.device, threads=train.threads, tf32=train.tf32)
        for written in predict_files(loaded, network, images, out, here.device, raw=raw):
            line = f"{written.image} -> {', '.join(file.name for file in written.files)}"
            if written.variance_range is not None:
                low, high = written.variance_range
                line += f"; variance {low:.4g} (dark blue) to {high:.4g} (yellow)"
            here.console.print(line)
        here.console.print(f"predictions are in {out}")
