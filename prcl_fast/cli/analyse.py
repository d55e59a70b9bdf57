"""`prcl analyse RUN_OR_CHECKPOINT [CHECKPOINT ...] [key.path=value ...]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prcl_fast.cli.arguments import SUBSETS, Device, NetworkName, RunOrCheckpoint
from prcl_fast.cli.completion import complete_override, one_of
from prcl_fast.errors import InputError
from prcl_fast.files.json_text import json_text


def analyse_command(
    run: RunOrCheckpoint,
    rest: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CHECKPOINT | KEY.PATH=VALUE]...",
            autocompletion=complete_override,
            help="More checkpoints of the run, for the path of its prototypes (those in the run folder are "
            "always included), and values of data.* that replace the run's.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write into; RUN/analysis by default.")
    ] = None,
    subset: Annotated[str, typer.Option(help="val, labeled or unlabeled.", autocompletion=SUBSETS)] = "val",
    pixels: Annotated[int, typer.Option(help="Largest number of pixels of each class.")] = 300,
    by: Annotated[
        str,
        typer.Option(
            help="Draw and group pixels by their true class (label) or by prediction.",
            autocompletion=one_of("label", "prediction"),
        ),
    ] = "label",
    network: NetworkName = None,
    seed: Annotated[int, typer.Option(help="Seed of the drawn pixels and of t-SNE.")] = 0,
    device: Device = "auto",
) -> None:
    """Measure and draw a run's representation space.

    Measured: silhouette, Davies-Bouldin index, intra- and inter-class variance, and the AUROC of sigma^2 as a
    detector of wrong pixels. Drawn: t-SNE with prototypes and virtual negatives, and the path of the
    prototypes over the run's checkpoints.

    The last line on standard output is one JSON object; analysis.json holds all results.
    """
    from prcl_fast.analysis.embedding_report import LABEL, PREDICTION, Question, write_analysis
    from prcl_fast.console import check_known, counting, note
    from prcl_fast.data.source import SUBSETS
    from prcl_fast.device import choose_device

    check_known("subset", [subset], SUBSETS)
    check_known("by", [by], (LABEL, PREDICTION))
    further, overrides = _checkpoints_and_overrides(rest or [])
    question = Question(subset, pixels, by, seed, network)
    with counting("embed images") as progress:
        result = write_analysis(run, further, overrides, question, out, choose_device(device), progress, note)
    _print(result)
    metrics = result["metrics"]
    keys = (
        *("silhouette", "davies_bouldin", "intra_variance", "inter_variance"),
        *("trace_intra", "trace_inter", "trace_ratio"),
    )
    print(json_text({key: metrics[key] for key in keys} | {"output": result["output"]}))


def _checkpoints_and_overrides(rest: list[str]) -> tuple[list[Path], list[str]]:
    """Checkpoints and overrides. Raises InputError for an override of anything but data.*."""
    checkpoints: list[Path] = []
    overrides: list[str] = []
    for text in rest:
        if "=" not in text or Path(text).exists():
            checkpoints.append(Path(text))
        elif text.startswith("data."):
            overrides.append(text)
        else:
            raise InputError(
                f"override {text!r}: analyse takes data.* only; the network determines the other settings"
            )
    return checkpoints, overrides


def _print(result: dict[str, Any]) -> None:
    from prcl_fast.console import print_table, say

    data, metrics = result["data"], result["metrics"]
    title = (
        f"{result['checkpoint']}, iteration {result['iteration']}, {result['network']}: {data['pixels']} "
        f"pixels of {data['subset']} ({data['images']} images, list {data['list']}) "
        f"by {result['settings']['by']}"
    )
    rows = [
        [
            row["name"],
            str(row["pixels"]),
            _number(row["intra_variance"], 3),
            _number(row["variance_mean"], 4),
            _number(row["variance_rank"]),
            _number(row["iou"], 2),
            _number(row["iou_rank"]),
        ]
        for row in result["classes"]
    ]
    columns = ["class", "pixels", "intra variance", "sigma^2", "rank", "IoU %", "rank"]
    print_table(title, columns, rows, right=range(1, 7))
    say(f"representation: {result['representation']['meaning']}, {result['representation']['dim']} "
               "numbers a pixel, L2-normalised")  # fmt: skip
    say(f"prototypes: {result['prototypes']['origin']}")
    say(
        f"silhouette {metrics['silhouette']:.4f}, Davies-Bouldin {metrics['davies_bouldin']:.3f}, "
        f"intra-class variance {metrics['intra_variance']:.4f}, inter-class {metrics['inter_variance']:.4f}"
    )
    say(
        f"not normalised: tr(inter-class) / tr(intra-class) {_number(metrics['trace_ratio'], 3)}, "
        f"tr(inter-class) {metrics['trace_inter']:.4g}, tr(intra-class) {metrics['trace_intra']:.4g}"
    )
    if metrics["variance_auroc"] is not None:
        say(
            f"AUROC of sigma^2 as a detector of wrong pixels ({metrics['wrong_share']:.0%} of those drawn): "
            f"{metrics['variance_auroc']:.3f} (0.5: chance)"
        )
    if metrics["variance_iou_correlation"] is not None:
        say(
            "rank correlation of sigma^2 and IoU over classes: "
            f"{metrics['variance_iou_correlation']:.2f} (-1: sigma^2 is largest where IoU is lowest)"
        )


def _number(value: float | None, digits: int = 0) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if digits else f"{value:g}"
