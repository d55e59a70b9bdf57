"""Report on the representation space of a run: metrics and figures."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from prcl_fast.analysis.cluster_quality import (
    DEFINITIONS,
    ClusterQuality,
    cluster_quality,
    normalized,
    rank_correlation,
    ranks,
    variance_auroc,
)
from prcl_fast.analysis.embedding import (
    MEANING,
    Embedding,
    Progress,
    embed,
    label_maps,
    prediction_maps,
)
from prcl_fast.analysis.embedding_figures import (
    MIN_POINTS,
    Space,
    draw_prototypes,
    draw_tsne,
    perplexity_of,
)
from prcl_fast.analysis.prototype_path import checkpoints_of, logged_shift, moves, prototype_path
from prcl_fast.analysis.prototypes import Prototypes, pixel_prototypes, stored_virtual_negatives
from prcl_fast.analysis.style import save_figure
from prcl_fast.config import Config, override_config
from prcl_fast.data.pixel_draws import DrawnPixels, draw_pixels
from prcl_fast.data.source import Source
from prcl_fast.data.sources import build_source
from prcl_fast.device import prepare_device
from prcl_fast.errors import InputError
from prcl_fast.files.folders import check_subfolder
from prcl_fast.files.locking import locked_folder
from prcl_fast.files.writing import write_text
from prcl_fast.runs.checkpoint import LoadedRun, find_checkpoint, load_checkpoint, load_run
from prcl_fast.runs.metrics import read_metrics

LABEL, PREDICTION = "label", "prediction"


@dataclass(frozen=True)
class Question:
    """The subset, pixels and network of an analysis."""

    subset: str = "val"
    pixels: int = 300  # largest number of each class
    by: str = LABEL  # or PREDICTION: the classes by which pixels are drawn and grouped
    seed: int = 0  # of the drawn pixels, of t-SNE and of the virtual negatives
    network: str | None = None  # a key of LoadedRun.networks; None: the first


def write_analysis(
    run: str | Path,
    further: Sequence[str | Path],
    overrides: Sequence[str],
    question: Question,
    out: str | Path | None,
    device: torch.device,
    progress: Progress,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Writes analysis.json, tsne.png and prototypes.png into `out`, by default RUN/analysis.

    Args:
        run: a checkpoint file, or a run folder: then its best.pt, else last.pt is analysed, and the
            prototypes of all its checkpoints are drawn.
        further: more checkpoints of the run, whose prototypes are drawn too.
        overrides: values of `data.*` that replace the run's.
        progress: called with (images done, images in all) after each image.
        say: takes a line about a long calculation.

    Returns:
        The content of analysis.json, and "output", its folder.

    Raises:
        InputError: a checkpoint, argument or data set does not fit; then nothing is written.
    """
    if question.pixels < 1:
        raise InputError(f"pixels: {question.pixels} is less than 1")
    if question.seed < 0:
        raise InputError(f"seed: {question.seed} is negative")
    run, others = Path(run), [Path(path) for path in further]
    main = find_checkpoint(run)
    if out is None:
        out = main.parent / "analysis"
        check_subfolder(out)
    with locked_folder(Path(out), "out"):
        return _write_analysis(main, run, others, overrides, question, Path(out), device, progress, say)


def _write_analysis(
    main: Path,
    run: Path,
    others: Sequence[Path],
    overrides: Sequence[str],
    question: Question,
    out: Path,
    device: torch.device,
    progress: Progress,
    say: Callable[[str], None],
) -> dict[str, Any]:
    loaded = load_run(main, device)
    name = next(iter(loaded.networks)) if question.network is None else question.network
    if name not in loaded.networks:
        raise InputError(f"network: {main} has no {name}, only {', '.join(loaded.networks)}")
    analysis = _Analysis(name, override_config(loaded.config, overrides), question, device, progress)
    train = analysis.config.train
    prepare_device(device, threads=train.threads, tf32=train.tf32)
    drawn = analysis.draw(loaded)
    embedding = analysis.embed(loaded, drawn)
    if np.ptp(normalized(embedding.representation), axis=0).max() == 0:
        raise InputError(f"{main}: all representations of its {name} are the same")

    def of_pixels(file: Path) -> Prototypes:
        its_embedding = embedding if file == main else analysis.embed(load_run(file, device), drawn)
        return pixel_prototypes(its_embedding, drawn, len(loaded.classes))

    path = prototype_path(main, [*checkpoints_of(run), *others], of_pixels)
    current = next(point.prototypes for point in path if point.file == main)
    wrong = None if drawn.truth is None else embedding.prediction != drawn.truth
    space = Space(
        loaded.classes,
        loaded.palette,
        embedding.representation,
        drawn.group,
        "true class" if question.by == LABEL else "predicted class",
        current.mean,
        stored_virtual_negatives(loaded.config.method, load_checkpoint(main)["method"], question.seed),
        None if embedding.variance is None else embedding.variance.mean(axis=1),
        wrong,
    )
    quality = cluster_quality(embedding.representation, drawn.group, len(loaded.classes))
    iou = _logged_iou(loaded) if name == next(iter(loaded.networks)) else {}
    result = {
        "checkpoint": str(main),
        "iteration": loaded.iteration,
        "method": loaded.config.method.name,
        "network": name,
        "settings": asdict(question) | {"network": name},
        "data": analysis.describe(drawn),
        "representation": {
            "kind": embedding.kind,
            "meaning": MEANING[embedding.kind],
            "dim": embedding.representation.shape[1],
            "normalised": "L2, for every number but the traces and every picture",
        },
        **_numbers(space, quality, iou),
        "prototypes": {"origin": current.origin, "checkpoints": moves(path, loaded.classes)},
        "tsne": {"perplexity": perplexity_of(len(drawn.group)), "init": "pca", "random_state": question.seed},
        "definitions": DEFINITIONS,
    }
    iterations = [point.iteration for point in path]
    means = np.stack([point.prototypes.mean for point in path])
    shift = logged_shift(main.parent, len(loaded.classes))
    say(f"t-SNE of {len(drawn.group)} pixels")
    with threadpool_limits(train.threads):  # of scikit-learn, which depends on threadpoolctl
        tsne = draw_tsne(space, question.seed)
    figures = {
        "tsne.png": tsne,
        "prototypes.png": draw_prototypes(space, iterations, means, shift),
    }
    for file, figure in figures.items():
        save_figure(figure, out / file)
    write_text(out / "analysis.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    return result | {"output": str(out)}


class _Analysis:
    """The data and settings of all checkpoints' analysis."""

    def __init__(
        self, network: str, config: Config, question: Question, device: torch.device, progress: Progress
    ) -> None:
        self.network, self.config, self.question = network, config, question
        self.device, self.progress = device, progress
        self.source: Source = build_source(config.data)
        self.split = self.source.splits[question.subset]
        if not self.split.names:
            raise InputError(f"data.{question.subset}: is empty")

    def draw(self, run: LoadedRun) -> DrawnPixels:
        """Draws the pixels. Raises InputError for too few pixels or classes."""
        if self.source.classes != run.classes:
            raise InputError(
                f"{run.path}: trained on other classes ({', '.join(run.classes)}) than the data have "
                f"({', '.join(self.source.classes)})"
            )
        question, names = self.question, self.split.names
        if question.by == LABEL:
            drawn = draw_pixels(label_maps(self.source, names), question.pixels, question.seed)
            what = "labeled pixels"
        else:
            # Unlabeled images need no label file.
            labeled = question.subset != "unlabeled"
            maps = prediction_maps(
                run.networks[self.network], self.source, names, self.config, self.device,
                labeled=labeled, progress=self.progress,
            )  # fmt: skip
            drawn = draw_pixels(maps, question.pixels, question.seed)
            what = "pixels predicted"
        present = np.unique(drawn.group)
        if len(present) < 2:
            found = run.classes[present[0]] if len(present) else "none"
            raise InputError(
                f"data.{question.subset}: {what} of at least 2 classes are needed; found: {found}"
            )
        needed = max(MIN_POINTS, len(present) + 1)
        if len(drawn.group) < needed:
            raise InputError(
                f"pixels: {question.pixels} of each class give {len(drawn.group)} points; "
                f"t-SNE and the silhouette need {needed}"
            )
        return drawn

    def embed(self, run: LoadedRun, drawn: DrawnPixels) -> Embedding:
        network = run.networks[self.network]
        return embed(network, self.source, self.split.names, drawn, self.config, self.device, self.progress)

    def describe(self, drawn: DrawnPixels) -> dict[str, Any]:
        return {
            "subset": self.question.subset,
            "images": len(self.split.names),
            "list": self.split.fingerprint,
            "family": self.split.family,
            "pixels": len(drawn.group),
            "grid": "the decoder's, stride 4, of whole images at their own size",
        }


def _numbers(space: Space, quality: ClusterQuality, iou: Mapping[str, float]) -> dict[str, Any]:
    """The metrics of all pixels, and of each class that has pixels."""
    count = np.bincount(space.group, minlength=len(space.classes))
    present = np.flatnonzero(count)
    accuracy = np.array([iou.get(name, np.nan) for name in space.classes])[present]
    variance: np.ndarray = np.full(len(present), np.nan)
    if space.variance is not None:
        variance = np.array([space.variance[space.group == index].mean() for index in present])
    variance_rank, iou_rank = ranks(variance), ranks(-accuracy)
    auroc = None
    if space.variance is not None and space.wrong is not None:
        auroc = variance_auroc(space.variance, space.wrong)
    metrics = {
        "silhouette": quality.silhouette,
        "davies_bouldin": quality.davies_bouldin,
        "intra_variance": quality.intra_variance,
        "inter_variance": quality.inter_variance,
        "trace_intra": quality.trace_intra,
        "trace_inter": quality.trace_inter,
        "trace_ratio": quality.trace_inter / quality.trace_intra if quality.trace_intra else None,
        "variance_auroc": auroc,
        "variance_iou_correlation": rank_correlation(variance, accuracy),
        "wrong_share": None if space.wrong is None else float(space.wrong.mean()),
    }
    classes = [
        {
            "name": space.classes[index],
            "pixels": int(count[index]),
            "intra_variance": float(quality.intra_by_class[index]),
            "variance_mean": _or_none(variance[place]),
            "variance_rank": _or_none(variance_rank[place]),
            "iou": _or_none(accuracy[place]),
            "iou_rank": _or_none(iou_rank[place]),
        }
        for place, index in enumerate(present)
    ]
    return {"metrics": metrics, "classes": classes}


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _logged_iou(run: LoadedRun) -> dict[str, float]:
    """IoU in percent on the validation images, as the run logged it at the checkpoint's iteration."""
    path = run.path.parent / "metrics.jsonl"
    if not os.path.lexists(path):
        return {}
    for record in read_metrics(path).evaluations:
        if record["iteration"] == run.iteration and isinstance(record.get("iou"), dict):
            numbers = {name: value for name, value in record["iou"].items() if isinstance(value, float)}
            return {name: value for name, value in numbers.items() if np.isfinite(value)}
    return {}
