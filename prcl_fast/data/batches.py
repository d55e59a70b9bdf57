"""Training batches: workers decode, the device augments, and every batch is a function of its number."""

from __future__ import annotations

import atexit
import itertools
import signal
import sys
import weakref
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from prcl_fast.config import Config, ConsistencyConfig
from prcl_fast.data.augment import weak_augment
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
from prcl_fast.data.sampler import BatchSampler, share
from prcl_fast.data.source import IGNORE, Source
from prcl_fast.errors import InputError


@dataclass
class Batch:
    """What one process sees of one micro-step, on its device."""

    labeled_image: Tensor  # [Bl, 3, h, w] float32 in [0, 1], weakly augmented, channels_last
    label: Tensor  # [Bl, h, w] uint8, 255 where not labeled or outside the image
    unlabeled_image: Tensor | None  # [Bu, 3, h, w] as labeled_image
    inside: Tensor | None  # [Bu, h, w] bool, False where the crop reaches outside the image
    strong: StrongDraws | None  # for strong augmentation and mixing of the unlabeled images
    seed: Tensor  # [2] int64: (seed of this process, micro-step)


def rank_seed(seed: int, rank: int) -> int:
    """The seed of process `rank` for draws on its device, in 0..2^63 - 1."""
    return int(generator(seed, Purpose.RANK, stream=rank).integers(2**63))


def training_batches(
    source: Source,
    config: Config,
    *,
    start: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device,
    unlabeled: bool,
) -> Generator[Batch, None, None]:
    """Micro-batches number start, start + 1, ... without end; `close()` ends the worker processes.

    Images and their augmentation are drawn for the whole step and then shared out, so that the union over
    micro-steps and processes is the same for every number of processes and every `train.accumulate`; only
    partners for mixing depend on them, for they come from the same micro-batch.

    Args:
        rank, world: this process and the number of processes; each gets batch / (world * accumulate) images.
        unlabeled: False leaves the unlabeled images out.

    Raises:
        InputError: a batch size that cannot be shared out, an empty split, or an image that cannot be read.
    """
    _check(source, config, world, unlabeled)
    steps = _MicroSteps(source, config, rank, world, unlabeled)
    stream = _augmented(steps, config, start, rank_seed(config.seed, rank), device)
    _streams.add(stream)
    return stream


_streams: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()


@atexit.register
def _close_streams() -> None:
    # Workers do not listen to signals, so an exit of the main process would wait for those of an open stream.
    for stream in list(_streams):
        stream.close()


def _check(source: Source, config: Config, world: int, unlabeled: bool) -> None:
    train = config.train
    parts = world * train.accumulate
    subsets = [("labeled", train.batch_labeled)]
    if unlabeled:
        subsets.append(("unlabeled", train.batch_unlabeled))
    for subset, batch in subsets:
        if not source.splits[subset].names:
            raise InputError(f"data.{subset}: no images, but the method needs them")
        if batch % parts:
            raise InputError(
                f"train.batch_{subset}: {batch} is not a multiple of {world} processes x train.accumulate "
                f"{train.accumulate}"
            )
    mix = config.method.mix if isinstance(config.method, ConsistencyConfig) else "none"
    if unlabeled and mix in ("cutmix", "classmix") and train.batch_unlabeled // parts < 2:
        raise InputError(
            f"train.batch_unlabeled: {train.batch_unlabeled} leaves one image to each pass of each of "
            f"{world} processes, but mix {mix} needs at least 2"
        )


def _augmented(
    steps: _MicroSteps, config: Config, start: int, seed: int, device: torch.device
) -> Generator[Batch, None, None]:
    workers = config.data.workers
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=_CountFrom(start),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_worker if workers else None,
    )
    iterator = iter(loader)
    try:
        for micro_step, loaded in zip(itertools.count(start), iterator, strict=False):
            if isinstance(loaded, _Mistake):
                raise InputError(loaded.message)
            yield _on_device(loaded, config, torch.tensor([seed, micro_step]), device)
    finally:
        if workers:
            # Not left to the iterator's end: the traceback of an error may keep it alive.
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def _start_worker(_: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach every process of a job. The main process alone reacts: it may
    # have to save its state, and must not lose its workers meanwhile.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = _print_unless_disconnected
    torch.set_num_threads(1)


def _print_unless_disconnected(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    # The thread that hands tensors over reports here when Ctrl-C stopped the main process from taking one.
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


class _CountFrom(Sampler[int]):
    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


@dataclass(frozen=True)
class _Pixels:
    """Decoded images of one subset and what becomes of them."""

    pixels: Tensor  # [B, H, W, 4] uint8: red, green, blue, label; padded to the largest image
    sizes: Tensor  # [B, 2] int64
    weak: WeakDraws

    def pin_memory(self) -> _Pixels:
        return _Pixels(self.pixels.pin_memory(), self.sizes.pin_memory(), self.weak.pin_memory())


@dataclass(frozen=True)
class _Loaded:
    labeled: _Pixels
    unlabeled: _Pixels | None
    strong: StrongDraws | None

    def pin_memory(self) -> _Loaded:
        return _Loaded(
            self.labeled.pin_memory(),
            None if self.unlabeled is None else self.unlabeled.pin_memory(),
            None if self.strong is None else self.strong.pin_memory(),
        )


@dataclass(frozen=True)
class _Mistake:
    """An InputError on its way out of a worker: raised there, it would come back wrapped in a traceback."""

    message: str

    def pin_memory(self) -> _Mistake:
        return self


class _MicroSteps(Dataset[_Loaded | _Mistake]):
    """Item number k is all that micro-step k needs, before augmentation."""

    def __init__(self, source: Source, config: Config, rank: int, world: int, unlabeled: bool) -> None:
        self.source, self.config = source, config
        self.rank, self.world, self.unlabeled = rank, world, unlabeled
        train = config.train
        self.labeled_sampler = BatchSampler(
            len(source.splits["labeled"].names), train.batch_labeled, config.seed, Purpose.ORDER_LABELED
        )
        if unlabeled:
            self.unlabeled_sampler = BatchSampler(
                len(source.splits["unlabeled"].names),
                train.batch_unlabeled,
                config.seed,
                Purpose.ORDER_UNLABELED,
            )

    def __getitem__(self, micro_step: int) -> _Loaded | _Mistake:
        try:
            labeled = self._pixels("labeled", self.labeled_sampler, micro_step, Purpose.WEAK_LABELED)
            if not self.unlabeled:
                return _Loaded(labeled, None, None)
            return _Loaded(
                labeled,
                self._pixels("unlabeled", self.unlabeled_sampler, micro_step, Purpose.WEAK_UNLABELED),
                self._strong(micro_step),
            )
        except InputError as error:
            return _Mistake(str(error))

    def _step_and_rows(self, micro_step: int, batch: int) -> tuple[int, slice]:
        accumulate = self.config.train.accumulate
        rows = share(batch, micro_step, accumulate=accumulate, rank=self.rank, world=self.world)
        return micro_step // accumulate, rows

    def _pixels(self, subset: str, sampler: BatchSampler, micro_step: int, purpose: Purpose) -> _Pixels:
        config = self.config
        step, rows = self._step_and_rows(micro_step, sampler.batch)
        names = self.source.splits[subset].names
        decoded = [self._decode(names[index], subset == "labeled") for index in sampler.indices(step)[rows]]
        sizes = np.array([image.shape[:2] for image in decoded])
        height, width = sizes.max(axis=0)
        pixels = np.empty((len(decoded), height, width, 4), dtype=np.uint8)
        for padded, image in zip(pixels, decoded, strict=True):
            padded[: image.shape[0], : image.shape[1]] = image
        uniform = generator(config.seed, purpose, step=step).random((sampler.batch, WEAK_NUMBERS))
        weak = weak_draws(uniform[rows], sizes, config.data.crop, config.data.augment)
        return _Pixels(torch.from_numpy(pixels), torch.from_numpy(sizes), weak)

    def _decode(self, name: str, labeled: bool) -> np.ndarray:
        """[H, W, 4] uint8: the image and its label."""
        image = self.source.image(name)
        pixels = np.full((*image.shape[:2], 4), IGNORE, dtype=np.uint8)
        pixels[..., :3] = image
        if labeled:
            pixels[..., 3] = self.source.label(name)
        return pixels

    def _strong(self, micro_step: int) -> StrongDraws:
        config = self.config
        step, rows = self._step_and_rows(micro_step, config.train.batch_unlabeled)
        uniform = generator(config.seed, Purpose.STRONG, step=step).random(
            (config.train.batch_unlabeled, STRONG_NUMBERS)
        )
        shift = generator(config.seed, Purpose.PARTNER, step=micro_step).random()
        return strong_draws(uniform[rows], shift, config.data.crop, config.data.augment)


def _on_device(loaded: _Loaded, config: Config, seed: Tensor, device: torch.device) -> Batch:
    if device.type == "cuda":
        seed = seed.pin_memory()
    labeled_image, label, _ = _weak(loaded.labeled, config, device)
    unlabeled_image, inside = None, None
    if loaded.unlabeled is not None:
        unlabeled_image, _, inside = _weak(loaded.unlabeled, config, device)
    strong = None if loaded.strong is None else loaded.strong.to(device)
    return Batch(labeled_image, label, unlabeled_image, inside, strong, seed.to(device, non_blocking=True))


def _weak(pixels: _Pixels, config: Config, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return weak_augment(
        pixels.pixels.to(device, non_blocking=True),
        pixels.sizes.to(device, non_blocking=True),
        pixels.weak.to(device),
        config.data.crop,
        config.data.mean,
    )
