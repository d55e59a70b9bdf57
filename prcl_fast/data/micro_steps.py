"""Micro-steps on the host: decoded images and random draws, a function of the micro-step's number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prcl_fast.config import Config
from prcl_fast.data.cache.decoded import ImageCache
from prcl_fast.data.decode import decode
from prcl_fast.data.draws import (
    STRONG_NUMBERS,
    WEAK_NUMBERS,
    StrongDraws,
    WeakDraws,
    strong_draws,
    weak_draws,
)
from prcl_fast.data.random_streams import RandomStream, generator
from prcl_fast.data.sampler import BatchSampler, rows_of
from prcl_fast.data.source import Source

_NAMES_SHOWN = 16


@dataclass(frozen=True)
class DecodedImages:
    """Images of one subset and the draws of their weak augmentation."""

    pixels: Tensor  # [B, H, W, 4] uint8: red, green, blue, label; padded to the largest image
    sizes: Tensor  # [B, 2] int64
    weak: WeakDraws


@dataclass(frozen=True)
class DecodedUnlabeled:
    """Unlabeled images and the draws of their strong augmentation and mixing."""

    images: DecodedImages
    strong: StrongDraws


@dataclass(frozen=True)
class DecodedBatch:
    """The images of a micro-step before augmentation; `data.batches.Batch` is made of it on the device."""

    labeled: DecodedImages
    unlabeled: DecodedUnlabeled | None
    seed: Tensor  # [2] int64: (seed of this rank, micro-step)


class MicroSteps:
    """Item number k holds the images of micro-step k for rank `rank` of `world`."""

    def __init__(
        self,
        source: Source,
        config: Config,
        *,
        rank: int,
        world: int,
        seed: int,
        cache: ImageCache | None,
    ) -> None:
        """`seed` is this rank's; images come from `cache` if there is one, else from the source."""
        self.source, self.config, self.cache = source, config, cache
        self.rank, self.world, self.seed = rank, world, seed
        train = config.train
        subsets = [("labeled", train.batch_labeled, RandomStream.ORDER_LABELED)]
        if config.method.needs_unlabeled:
            subsets.append(("unlabeled", train.batch_unlabeled, RandomStream.ORDER_UNLABELED))
        self.samplers = {
            subset: BatchSampler(len(source.splits[subset].names), batch, config.seed, stream)
            for subset, batch, stream in subsets
        }

    def __getitem__(self, micro_step: int) -> DecodedBatch:
        labeled = self._images("labeled", micro_step, RandomStream.WEAK_LABELED)
        unlabeled = None
        if "unlabeled" in self.samplers:
            images = self._images("unlabeled", micro_step, RandomStream.WEAK_UNLABELED)
            unlabeled = DecodedUnlabeled(images, self._strong(micro_step))
        return DecodedBatch(labeled, unlabeled, torch.tensor([self.seed, micro_step]))

    def names(self, micro_step: int) -> list[str]:
        """The images of a micro-step."""
        return [
            self.source.splits[subset].names[index]
            for subset in self.samplers
            for index in self._indices(subset, micro_step)
        ]

    def _step_and_rows(self, subset: str, micro_step: int) -> tuple[int, slice]:
        accumulate, batch = self.config.train.accumulate, self.samplers[subset].batch
        rows = rows_of(batch, micro_step, accumulate=accumulate, rank=self.rank, world=self.world)
        return micro_step // accumulate, rows

    def _indices(self, subset: str, micro_step: int) -> list[int]:
        step, rows = self._step_and_rows(subset, micro_step)
        return self.samplers[subset].indices(step)[rows]

    def _images(self, subset: str, micro_step: int, stream: RandomStream) -> DecodedImages:
        config = self.config
        images = [self._image(subset, index) for index in self._indices(subset, micro_step)]
        sizes = np.array([image.shape[:2] for image in images])
        step, rows = self._step_and_rows(subset, micro_step)
        numbers = (self.samplers[subset].batch, WEAK_NUMBERS)
        uniform = generator(config.seed, stream, step=step).random(numbers)
        weak = weak_draws(uniform[rows], sizes, config.data.crop, config.data.augment)
        return DecodedImages(torch.from_numpy(_padded(images, sizes)), torch.from_numpy(sizes), weak)

    def _image(self, subset: str, index: int) -> np.ndarray:
        if self.cache is not None:
            return self.cache.image(subset, index)
        return decode(self.source, self.source.splits[subset].names[index], subset == "labeled")

    def _strong(self, micro_step: int) -> StrongDraws:
        config = self.config
        step, rows = self._step_and_rows("unlabeled", micro_step)
        numbers = (config.train.batch_unlabeled, STRONG_NUMBERS)
        uniform = generator(config.seed, RandomStream.STRONG, step=step).random(numbers)
        return strong_draws(uniform[rows], config.data.crop, config.data.augment)


def named_images(names: Sequence[str]) -> str:
    """The first of some images, for a message."""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"images {', '.join(names[:_NAMES_SHOWN])}{more}"


def _padded(images: Sequence[np.ndarray], sizes: np.ndarray) -> np.ndarray:
    """[B, H, W, 4] of the largest height and width; pixels outside an image are never read."""
    height, width = sizes.max(axis=0)
    pixels = np.empty((len(images), height, width, 4), dtype=np.uint8)
    # A pixel with its label is one 32-bit word.
    for padded, image in zip(pixels.view(np.uint32), images, strict=True):
        padded[: image.shape[0], : image.shape[1]] = image.view(np.uint32)
    return pixels
