"""The plan of a run: its memory and time on this device, and its differences from the paper.

Needs no data set and writes nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prcl_fast.config import Config, DataConfig
from prcl_fast.config.paper import Difference, Paper, paper_batch, paper_differences, paper_of
from prcl_fast.data.sources import cityscapes, scene, voc
from prcl_fast.data.sources.file_source import class_names
from prcl_fast.device import choose_device
from prcl_fast.machine.description import device_name, free_memory
from prcl_fast.planning.batch_plan import BatchPlanner, MemoryPlan, Micro, Remedy, TimePlan
from prcl_fast.planning.memory_estimate import MemoryEstimator
from prcl_fast.planning.step_timer import StepTimer

_SECONDS = {"cpu": 50.0, "cuda": 15.0}  # for all measured steps together


@dataclass(frozen=True)
class Plan:
    """All results of `prcl plan`; `dataclasses.asdict` makes it JSON."""

    method: str
    backbone: str
    num_classes: int
    crop: list[int]
    device: str
    iterations: int
    batch_labeled: int
    batch_unlabeled: int
    accumulate: int
    memory: MemoryPlan
    time: TimePlan | None  # None: even the smallest micro-batch does not fit
    largest: Micro | None  # the largest micro-batch that fits; None: none fits, or free memory is not known
    remedy: Remedy | None  # None: the configured micro-batch fits
    paper_batch: Remedy | None  # None: the batch is the paper's
    paper: Paper | None  # compared with; None: the papers do not use this data set
    differences: list[Difference]
    notes: list[str]


def make_plan(config: Config) -> Plan:
    """Estimates memory, measures a few real steps on random images, and compares with the paper.

    Raises:
        InputError: a device that this machine does not have, or a file of class names that cannot be read.
    """
    device = choose_device(config.train.device)
    classes = num_classes(config.data)
    planner = BatchPlanner(config, MemoryEstimator(config, classes, device), free_memory(device))
    if planner.smallest_fits():
        with contextlib.suppress(torch.OutOfMemoryError):  # measurements before it are kept
            planner.measure(StepTimer(config, classes, device), _SECONDS[device.type])
    memory = planner.memory()
    remedy = planner.remedy(*planner.batch) if memory.fits is False else None
    reference = paper_batch(config)
    asks = reference is not None and reference != planner.batch
    train = config.train
    return Plan(
        method=config.method.name,
        backbone=config.model.backbone,
        num_classes=classes,
        crop=config.data.crop,
        device=f"{device} ({device_name(device)})" if device.type == "cuda" else str(device),
        iterations=train.iterations,
        batch_labeled=train.batch_labeled,
        batch_unlabeled=train.batch_unlabeled,
        accumulate=train.accumulate,
        memory=memory,
        time=planner.time(remedy.accumulate if remedy and remedy.accumulate else train.accumulate),
        largest=planner.largest(),
        remedy=remedy,
        paper_batch=planner.remedy(*reference) if reference is not None and asks else None,
        paper=paper_of(config),
        differences=paper_differences(config),
        notes=_notes(config, device),
    )


def num_classes(data: DataConfig) -> int:
    """The number of classes, read without the data set. Raises InputError for unreadable `data.classes`."""
    if data.kind == "synthetic":
        return len(scene.CLASSES)
    default: Sequence[str] = {"voc": voc.CLASSES, "cityscapes": cityscapes.CLASSES}.get(data.kind, ())
    return len(class_names(data.classes, default))


def _notes(config: Config, device: torch.device) -> list[str]:
    notes = []
    train = config.train
    if device.type != "cuda":
        notes += [
            f"train.{key}: needs a CUDA device; `prcl train` rejects it on {device}"
            for key in ("graph", "sync_check")
            if getattr(train, key)
        ]
    elif train.graph:
        notes.append("train.graph: steps were measured without it; captured steps are faster")
    if train.compile:
        notes.append("train.compile: steps were measured and estimated without it")
    for key, path in (("data.root", config.data.root), ("model.weights", config.model.weights)):
        if path is not None and not path.exists():
            notes.append(f"{key}: {os.path.normpath(path)} does not exist; `prcl train` needs it")
    return notes
