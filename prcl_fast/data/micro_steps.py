"""All that a micro-step needs of the host: decoded images and random draws, a function of its number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from prcl_fast.config import Config
from prcl_fast.data.cache.decoded import ImageCache
from prcl_fast.data.decode import decode
from prcl_fast.data.draws import (
    STRONG_NUMBERS,
    WEAK_NUMBERS,
    Purpose,
    StrongDraws,
    WeakDraws,
    generator,
    strong_draws,
    weak_draws,
)
from prcl_fast.data.source import Source
from prcl_fast.errors import InputError


@dataclass(frozen=True)
class Pixels:
    """Decoded images of one subset and what becomes of them."""

    pixels: Tensor  # [B, H, W, 4] uint8: red, green, blue, label; padded to the largest image
    sizes: Tensor  # [B, 2] int64
    weak: WeakDraws

    def pin_memory(self) -> Pixels:
        """The same in page-locked memory."""
        return Pixels(self.pixels.pin_memory(), self.sizes.pin_memory(), self.weak.pin_memory())


@dataclass(frozen=True)
class Loaded:
    """A micro-step before augmentation."""

    labeled: Pixels
    unlabeled: Pixels | None
    strong: StrongDraws | None
    seed: Tensor  # [2] int64: (seed of this process, micro-step)

    def pin_memory(self) -> Loaded:
        """The same in page-locked memory."""
        return Loaded(
            self.labeled.pin_memory(),
            None if self.unlabeled is None else self.unlabeled.pin_memory(),
            None if self.strong is None else self.strong.pin_memory(),
            self.seed.pin_memory(),
        )


@dataclass(frozen=True)
class Mistake:
    """An InputError on its way out of a worker: raised there, it would come back wrapped in a traceback."""

    message: str

    def pin_memory(self) -> Mistake:
        """Itself: the loader asks every item."""
        return self


class MicroSteps(Dataset[Loaded | Mistake]):
    """Item number k is all that micro-step k of process `rank` of `world` needs."""

    def __init__(
        self,
        source: Source,
        config: Config,
        *,
        rank: int,
        world: int,
        seed: int,
        unlabeled: bool,
        cache: ImageCache | None,
    ) -> None:
        """`seed` is that of this process; images come from `cache` if there is one, else from the source."""
        self.source, self.config, self.cache = source, config, cache
        self.rank, self.world, self.seed = rank, world, seed
        train = config.train
        subsets = [("labeled", train.batch_labeled, Purpose.ORDER_LABELED)]
        if unlabeled:
            subsets.append(("unlabeled", train.batch_unlabeled, Purpose.ORDER_UNLABELED))
        self.samplers = {
            subset: BatchSampler(len(source.splits[subset].names), batch, config.seed, purpose)
            for subset, batch, purpose in subsets
        }

    def __getitem__(self, micro_step: int) -> Loaded | Mistake:
        try:
            labeled = self._pixels("labeled", micro_step, Purpose.WEAK_LABELED)
            unlabeled, strong = None, None
            if "unlabeled" in self.samplers:
                unlabeled = self._pixels("unlabeled", micro_step, Purpose.WEAK_UNLABELED)
                strong = self._strong(micro_step)
        except InputError as error:
            return Mistake(str(error))
        return Loaded(labeled, unlabeled, strong, torch.tensor([self.seed, micro_step]))

    def names(self, micro_step: int) -> list[str]:
        """The images of a micro-step."""
        return [
            self.source.splits[subset].names[index]
            for subset in self.samplers
            for index in self._indices(subset, micro_step)
        ]

    def _step_and_rows(self, subset: str, micro_step: int) -> tuple[int, slice]:
        accumulate, batch = self.config.train.accumulate, self.samplers[subset].batch
        rows = share(batch, micro_step, accumulate=accumulate, rank=self.rank, world=self.world)
        return micro_step // accumulate, rows

    def _indices(self, subset: str, micro_step: int) -> list[int]:
        step, rows = self._step_and_rows(subset, micro_step)
        return self.samplers[subset].indices(step)[rows]

    def _pixels(self, subset: str, micro_step: int, purpose: Purpose) -> Pixels:
        config = self.config
        images = [self._image(subset, index) for index in self._indices(subset, micro_step)]
        sizes = np.array([image.shape[:2] for image in images])
        step, rows = self._step_and_rows(subset, micro_step)
        numbers = (self.samplers[subset].batch, WEAK_NUMBERS)
        uniform = generator(config.seed, purpose, step=step).random(numbers)
        weak = weak_draws(uniform[rows], sizes, config.data.crop, config.data.augment)
        return Pixels(torch.from_numpy(_padded(images, sizes)), torch.from_numpy(sizes), weak)

    def _image(self, subset: str, index: int) -> np.ndarray:
        if self.cache is not None:
            return self.cache.image(subset, index)
        return decode(self.source, self.source.splits[subset].names[index], subset == "labeled")

    def _strong(self, micro_step: int) -> StrongDraws:
        config = self.config
        step, rows = self._step_and_rows("unlabeled", micro_step)
        numbers = (config.train.batch_unlabeled, STRONG_NUMBERS)
        uniform = generator(config.seed, Purpose.STRONG, step=step).random(numbers)
        return strong_draws(uniform[rows], config.data.crop, config.data.augment)


def _padded(images: Sequence[np.ndarray], sizes: np.ndarray) -> np.ndarray:
    """[B, H, W, 4] of the largest height and width; what lies outside an image is never read."""
    height, width = sizes.max(axis=0)
    pixels = np.empty((len(images), height, width, 4), dtype=np.uint8)
    # A pixel with its label is one 32-bit word.
    for padded, image in zip(pixels.view(np.uint32), images, strict=True):
        padded[: image.shape[0], : image.shape[1]] = image.view(np.uint32)
    return pixels


class BatchSampler:
    """Batches from one random permutation per epoch.

    A batch never spans two epochs: what does not fill a batch is left out of that epoch, so that no image
    meets itself in a batch. With fewer images than a batch holds, the permutation is repeated within it.
    """

    def __init__(self, count: int, batch: int, seed: int, purpose: Purpose) -> None:
        """`count` images (at least 1), `batch` of them a step over all processes."""
        self.count, self.batch, self.seed, self.purpose = count, batch, seed, purpose
        self.batches_per_epoch = max(1, count // batch)
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def indices(self, step: int) -> list[int]:
        """The image indices of step `step` (from 0), for all processes together."""
        epoch, position = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            order = generator(self.seed, self.purpose, step=epoch).permutation(self.count)
            self._order = np.resize(order, max(self.count, self.batch))
            self._epoch = epoch
        return self._order[position * self.batch : (position + 1) * self.batch].tolist()


def share(batch: int, micro_step: int, *, accumulate: int, rank: int, world: int) -> slice:
    """The rows of a step's batch that process `rank` of `world` takes in micro-step `micro_step`.

    A step is `accumulate` micro-steps; together, the processes' micro-steps cover the batch once.
    """
    part = batch // (accumulate * world)
    first = (micro_step % accumulate * world + rank) * part
    return slice(first, first + part)
