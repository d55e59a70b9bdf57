"""`prcl eval RUN_OR_CHECKPOINT [key.path=value ...]`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from prcl_fast.cli.arguments import SUBSETS, Device, RunOrCheckpoint
from prcl_fast.cli.completion import complete_override
from prcl_fast.errors import InputError
from prcl_fast.files.json_text import json_text

_OVERRIDABLE = ("data.", "eval.", "train.amp=", "train.threads=")


def evaluate_command(
    run: RunOrCheckpoint,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY.PATH=VALUE]...",
            autocompletion=complete_override,
            help="Values of data.*, eval.*, train.amp or train.threads that replace the run's.",
        ),
    ] = None,
    subset: Annotated[
        str,
        typer.Option(
            help="val, labeled, or unlabeled (the quality of pseudo-labels, if masks exist).",
            autocompletion=SUBSETS,
        ),
    ] = "val",
    device: Device = "auto",
) -> None:
    """Evaluate a run's networks on its validation images.

    The run's settings apply unless overridden. Example: prcl eval runs/mine eval.mode=sliding

    The table goes to standard error; the last line on standard output is one JSON object.
    """
    from prcl_fast.config import override_config
    from prcl_fast.console import check_known, counting
    from prcl_fast.data.source import SUBSETS
    from prcl_fast.data.sources import build_source
    from prcl_fast.device import prepare_device
    from prcl_fast.engine.evaluate import evaluate, format_table
    from prcl_fast.engine.rank_facts import check_same_evaluation
    from prcl_fast.processes.session import session
    from prcl_fast.runs.checkpoint import load_run

    def check_arguments() -> None:
        check_known("subset", [subset], SUBSETS)
        _check_overrides(overrides or ())

    with session("eval", check_arguments, lambda _: device) as here:
        console = here.console
        loaded = load_run(run, here.device)
        config = override_config(loaded.config, overrides or ())
        train = config.train
        prepare_device(here.device, threads=train.threads, tf32=train.tf32)
        source = build_source(config.data)
        if source.classes != loaded.classes:
            raise InputError(_other_classes(loaded.path, loaded.classes, source.classes))
        check_same_evaluation(loaded, config, source, subset)
        started = time.monotonic()
        with counting("evaluate", console) as progress:
            results = evaluate(
                loaded.networks,
                source,
                config.data,
                config.eval,
                here.device,
                subset=subset,
                amp=train.amp,
                progress=progress,
            )
        seconds = time.monotonic() - started
        main = next(iter(results.values()))
        if not main.confusion.any():
            raise InputError(f"data.{subset}: no pixel of these images has a label")
        split = source.splits[subset]
        console.print(
            f"{loaded.path}, iteration {loaded.iteration}: {subset}, {len(split.names)} images, "
            f"{split.family}, list {split.fingerprint}, mode {config.eval.mode}",
        )
        console.print(format_table(results, source.classes))
        summary = {
            "miou": main.miou,
            "miou_student": results["student"].miou,
            "iterations": loaded.iteration,
            "seconds": round(seconds, 1),
            "output": str(loaded.path),
            "subset": subset,
            "mode": config.eval.mode,
            "images": len(split.names),
            **({} if main.uncertainty is None else main.uncertainty.summary()),
            "iou": main.iou_by_class(source.classes),
            "iou_student": results["student"].iou_by_class(source.classes),
        }
        if "teacher_prototypes" in results:
            summary["miou_teacher_prototypes"] = results["teacher_prototypes"].miou
        here.result(json_text(summary))


def _check_overrides(overrides: Sequence[str]) -> None:
    for override in overrides:
        if not override.startswith(_OVERRIDABLE):
            raise InputError(
                f"override {override!r}: eval takes data.*, eval.*, train.amp and train.threads; "
                "the network determines the other settings"
            )


def _other_classes(path: Path, trained: Sequence[str], given: Sequence[str]) -> str:
    if len(trained) != len(given):
        return f"{path}: trained on {len(trained)} classes, the data set has {len(given)}"
    index = next(i for i, pair in enumerate(zip(trained, given, strict=True)) if pair[0] != pair[1])
    return f"{path}: class {index} is {trained[index]!r} in the checkpoint, {given[index]!r} in the data set"
