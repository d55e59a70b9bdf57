"""Measured time and memory of a training step on random images."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prcl_fast.config import Config
from prcl_fast.data.batches import Batch, UnlabeledBatch
from prcl_fast.data.draws import STRONG_NUMBERS, strong_draws
from prcl_fast.device import prepare_device
from prcl_fast.engine.step import TrainStep
from prcl_fast.machine.memory import reset_resident_peak, resident_bytes, resident_peak
from prcl_fast.methods import build_method
from prcl_fast.planning.part_meter import PartTimer
from prcl_fast.step_parts import listening

_MOST_STEPS = 3  # timed at one size, after the first
_UPDATE = ("optimizer", "ema")  # run once a step, whatever train.accumulate is


@dataclass(frozen=True)
class StepMeasurement:
    """Time and memory of real steps with one micro-batch each."""

    labeled: int  # images
    unlabeled: int
    steps: int  # timed; 1: the first step itself, which also sets libraries up
    pass_seconds: float  # one forward and backward pass
    update_seconds: float  # the optimiser's step and the teacher's
    peak_bytes: int | None  # peak memory since before the networks were built; None: not known


class StepTimer:
    """Runs real optimiser steps of a configuration's method. The weights stay as they are.

    Excludes data loading and weak augmentation. Networks are not compiled, and steps are not captured.
    """

    def __init__(self, config: Config, num_classes: int, device: torch.device) -> None:
        self.config, self.num_classes, self.device = config, num_classes, device
        prepare_device(device, threads=config.train.threads, tf32=config.train.tf32)
        self._peak = _CudaPeak(device) if device.type == "cuda" else _ProcessPeak()
        method = build_method(config, num_classes)
        method.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        method.lay_out()
        method.train()
        self._step = TrainStep(method, config, device)

    def measure(self, labeled: int, unlabeled: int, seconds: float) -> StepMeasurement:
        """Runs steps on micro-batches of this size for about `seconds`, and at least one step.

        Raises:
            torch.OutOfMemoryError: the micro-batch does not fit on a CUDA device.
        """
        batch = random_batch(self.config, self.num_classes, labeled, unlabeled, self.device)
        first = self._timed(batch)
        steps = min(_MOST_STEPS, int(seconds / sum(first)) - 1)
        times = [self._timed(batch) for _ in range(steps)] or [first]
        pass_seconds, update_seconds = (statistics.median(values) for values in zip(*times, strict=True))
        peak = self._peak.growth()
        return StepMeasurement(labeled, unlabeled, len(times), pass_seconds, update_seconds, peak)

    def _timed(self, batch: Batch) -> tuple[float, float]:
        # At the end of the schedule the learning rate is 0, so random labels do not change the weights.
        self._step.iteration.fill_(self.config.train.iterations)
        timer = PartTimer(self.device)
        with listening(timer), timer.step():
            self._step([batch])
        (parts,) = timer.steps()
        update = sum(milliseconds for name, milliseconds in parts.items() if name in _UPDATE)
        return (sum(parts.values()) - update) / 1e3, update / 1e3


def random_batch(
    config: Config, num_classes: int, labeled: int, unlabeled: int, device: torch.device
) -> Batch:
    """A batch of uniform random images and labels of size `data.crop`, every pixel inside the image.

    Args:
        labeled, unlabeled: numbers of images; with 0 unlabeled ones the batch has no unlabeled part.
    """
    height, width = config.data.crop

    def images(count: int) -> Tensor:
        return torch.rand(count, height, width, 3, device=device).permute(0, 3, 1, 2)

    label = torch.randint(num_classes, (labeled, height, width), dtype=torch.uint8, device=device)
    seed = torch.zeros(2, dtype=torch.int64, device=device)
    if not unlabeled:
        return Batch(images(labeled), label, None, seed)
    uniform = np.random.default_rng(0).random((unlabeled, STRONG_NUMBERS))
    labeled_images = images(labeled)
    unlabeled_part = UnlabeledBatch(
        images(unlabeled),
        torch.ones(unlabeled, height, width, dtype=torch.bool, device=device),
        strong_draws(uniform, config.data.crop, config.data.augment).to(device),
    )
    return Batch(labeled_images, label, unlabeled_part, seed)


class _CudaPeak:
    """Growth of the peak of PyTorch's allocator since construction, workspaces of libraries included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.reset_peak_memory_stats(device)
        self._before = torch.cuda.memory_allocated(device)

    def growth(self) -> int | None:
        return torch.cuda.max_memory_allocated(self._device) - self._before


class _ProcessPeak:
    """Growth of the peak resident memory since construction, including freed memory that malloc keeps."""

    def __init__(self) -> None:
        self._before = resident_bytes() if reset_resident_peak() else None

    def growth(self) -> int | None:
        return None if self._before is None else resident_peak() - self._before
