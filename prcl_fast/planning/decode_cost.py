"""Time of decoding images, and the number of data workers that keep up with a step."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

from prcl_fast.data.decode import decode
from prcl_fast.data.source import Source


@dataclass(frozen=True)
class SubsetCost:
    """Decoding time of one subset's images, with their labels if they are trained on."""

    milliseconds: float  # median per image
    decoded_bytes: float  # mean per image, 4 bytes a pixel
    images: int  # how many were measured


@dataclass(frozen=True)
class DecodeCost:
    """Decoding time of the subsets that training reads; None for an empty subset."""

    labeled: SubsetCost | None
    unlabeled: SubsetCost | None


def decode_cost(source: Source, images: int = 16) -> DecodeCost:
    """Decodes up to `images` images of each subset, spread over its split, in this process.

    Files in the system's page cache are read from there.

    Raises:
        InputError: an image that cannot be read.
    """
    return DecodeCost(_measured(source, "labeled", images), _measured(source, "unlabeled", images))


def workers_needed(cost: DecodeCost, images_per_step: Mapping[str, int], step_seconds: float) -> int:
    """The number of workers, at least 1, that decode a step's images in the time of a step.

    Args:
        images_per_step: images of "labeled" and "unlabeled" that one process trains on in a step.
        step_seconds: time of a step that never waits for images.
    """
    seconds = 0.0
    for subset, count in images_per_step.items():
        measured = getattr(cost, subset)
        if measured is not None:
            seconds += count * measured.milliseconds / 1000
    return max(1, math.ceil(seconds / step_seconds))


def _measured(source: Source, subset: str, images: int) -> SubsetCost | None:
    names = source.splits[subset].names
    sample = names[:: max(1, len(names) // images)][:images]
    if not sample:
        return None
    milliseconds, sizes = [], []
    for name in sample:
        started = time.perf_counter()
        pixels = decode(source, name, subset == "labeled")
        milliseconds.append(1000 * (time.perf_counter() - started))
        sizes.append(pixels.nbytes)
    return SubsetCost(statistics.median(milliseconds), statistics.fmean(sizes), len(sample))
