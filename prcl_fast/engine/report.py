"""Reports of a run: its opening lines, the record of an evaluation, the final summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from prcl_fast.config import Config
from prcl_fast.config.paper import paper_batch, paper_of
from prcl_fast.data.source import Source
from prcl_fast.engine.evaluate import Evaluation
from prcl_fast.engine.progress import Progress
from prcl_fast.engine.uncertainty import HeadMovement, explain_unlearned
from prcl_fast.methods import Method
from prcl_fast.processes.collectives import world_size

_OF_VARIANCE = ("variance_auroc", "variance_auroc_student", "confidence_auroc", "variance_moved")


def opening_lines(config: Config, source: Source, method: Method, device: torch.device) -> Iterator[str]:
    """Lines about the splits, the network, device and precision, and the batch."""
    train = config.train
    for name, split in source.splits.items():
        if split.names:
            yield f"{name}: {len(split.names)} images, {split.family}, list {split.fingerprint}"
    learners = method.learners()
    parameters = sum(p.numel() for p in method.student.parameters())
    networks = f"{len(learners)} networks of " if len(learners) > 1 else ""
    precision = "float32" if train.amp == "off" else f"{train.amp} autocast"
    if device.type == "cuda":
        precision += ", TF32" if train.tf32 else ", no TF32"
    yield (
        f"{config.method.name}: {config.model.backbone}, {networks}{parameters / 1e6:.1f} M parameters, "
        f"{len(source.classes)} classes, on {device} in {precision}; output {config.output}"
    )
    batch = (train.batch_labeled, train.batch_unlabeled)
    if world_size() > 1:
        labeled, unlabeled = (count // (world_size() * train.accumulate) for count in batch)
        yield (
            f"{world_size()} processes of {labeled} + {unlabeled} images a pass, batch norm over the images "
            f"of {'all of them' if train.sync_bn else 'each'}"
        )
    paper, there = paper_of(config), paper_batch(config)
    if there is not None and batch != there:
        yield (
            f"note: {batch[0]} + {batch[1]} images a step over all processes, {there[0]} + {there[1]} in "
            f"this program's settings of the {paper} paper; the learning rate stays {config.optim.lr:g}, as "
            "configured"
        )


def evaluation_record(
    results: Mapping[str, Evaluation], head: HeadMovement | None, iteration: int, config: Config
) -> dict[str, Any]:
    """The figures of an evaluation for the log and the summary.

    A collective where there is a probability head: every rank must call it.

    Args:
        results: by network, that of the run's mIoU first.
        head: of the student; None where it has no probability head.
        iteration: optimiser steps done.
    """
    main, student = next(iter(results.values())), results["student"]
    record: dict[str, Any] = {"miou": main.miou, "miou_student": student.miou}
    if "teacher_prototypes" in results:
        record["miou_teacher_prototypes"] = results["teacher_prototypes"].miou
    if head is None or main.uncertainty is None or student.uncertainty is None:
        return record
    moved = head.moved()
    record |= main.uncertainty.summary() | {"variance_moved": moved}
    if student.uncertainty.summary():
        record["variance_auroc_student"] = student.uncertainty.variance.auroc
    # In the first half of a run, sigma^2 still has time to move.
    note = explain_unlearned(moved, config.probability_lr)
    if note is not None and 2 * iteration >= config.train.iterations:
        record["note"] = note
    return record


def run_summary(progress: Progress, iterations: int, output: Path) -> dict[str, Any]:
    """The figures of the last evaluation, and of the run as a whole."""
    last = progress.last
    return {
        "miou": last["miou"],
        "miou_student": last["miou_student"],
        **{key: last[key] for key in _OF_VARIANCE if key in last},
        "best_miou": progress.best_miou if progress.best_miou >= 0 else None,
        "best_iteration": progress.best_iteration,
        "iterations": iterations,
        "seconds": round(progress.seconds, 1),
        "output": str(output),
    }
