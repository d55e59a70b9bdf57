"""Training batches: workers decode, the device augments, every batch is a function of its number."""

from __future__ import annotations

import atexit
import contextlib
import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from prcl_fast.config import Config
from prcl_fast.data.augment import weak_augment
from prcl_fast.data.cache.decoded import ImageCache, open_cache
from prcl_fast.data.draws import StrongDraws
from prcl_fast.data.micro_steps import DecodedBatch, DecodedImages, MicroSteps
from prcl_fast.data.prefetch import prefetched
from prcl_fast.data.random_streams import RandomStream, generator
from prcl_fast.data.source import Source
from prcl_fast.data.workers import decoded_micro_steps
from prcl_fast.errors import InputError
from prcl_fast.step_parts import part


@dataclass
class UnlabeledBatch:
    """The unlabeled images of a batch."""

    image: Tensor  # [Bu, 3, h, w] float32 in [0, 1], weakly augmented, channels_last
    inside: Tensor  # [Bu, h, w] bool, False where the crop reaches outside the image
    strong: StrongDraws  # of their strong augmentation and mixing


@dataclass
class Batch:
    """One rank's images of one micro-step, on its device."""

    labeled_image: Tensor  # [Bl, 3, h, w] float32 in [0, 1], weakly augmented, channels_last
    label: Tensor  # [Bl, h, w] uint8, 255 where not labeled or outside the image
    unlabeled: UnlabeledBatch | None  # None where the method does not need it
    seed: Tensor  # [2] int64: (seed of this rank, micro-step)

    def needed_unlabeled(self) -> UnlabeledBatch:
        """`unlabeled`, for a method that needs it. Raises ValueError where it is None."""
        if self.unlabeled is None:
            raise ValueError("this batch was made for a method without unlabeled images")
        return self.unlabeled


def rank_seed(seed: int, rank: int) -> int:
    """The seed of rank `rank` for draws on its device, in 0..2^63 - 1."""
    return int(generator(seed, RandomStream.RANK, index=rank).integers(2**63))


def training_cache(
    source: Source, config: Config, *, say: Callable[[str], None] | None = None
) -> ImageCache | None:
    """The images of `data.cache`, built if need be; None where the configuration has no cache.

    Args:
        say: takes lines about the building.

    Raises:
        InputError: an image that cannot be read, or, naming data.cache, not enough room or no access.
    """
    if config.data.cache == "none":
        return None
    subsets = ("labeled", "unlabeled") if config.method.needs_unlabeled else ("labeled",)
    return open_cache(source, config.data, subsets, say)


def training_batches(
    source: Source,
    config: Config,
    *,
    start: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device,
    cache: ImageCache | None = None,
) -> Generator[Batch, None, None]:
    """Micro-batches number start, start + 1, ... without end; `close()` ends the worker processes.

    Images and their augmentation are drawn for the whole step and then divided, so the union over
    micro-steps and ranks is the same for every number of ranks and every `train.accumulate`. So are the
    partners for mixing, which come from the same micro-batch, wherever it holds an even number of images.

    Args:
        rank, world: this rank and the number of ranks; each gets batch / (world * accumulate) images.
        cache: from `training_cache`; None opens it in this call.

    Raises:
        InputError: a batch size that cannot be divided, an empty split, an image that cannot be read, or no
            room for `data.cache`.
        WorkerDiedError: from the generator: a worker process was killed.
    """
    check_batches(source, config, world)
    steps = MicroSteps(
        source,
        config,
        rank=rank,
        world=world,
        seed=rank_seed(config.seed, rank),
        cache=cache or training_cache(source, config),
    )
    stream = _augmented(steps, config, start, device)
    _streams.add(stream)
    return stream


def images_of_step(source: Source, config: Config, step: int) -> list[str]:
    """The images of optimiser step `step`, over all ranks and micro-steps."""
    whole = config.model_copy(update={"train": config.train.model_copy(update={"accumulate": 1})})
    return MicroSteps(source, whole, rank=0, world=1, seed=0, cache=None).names(step)


_streams: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()


@atexit.register
def _close_streams() -> None:
    # Workers ignore signals: at its exit, the main process would wait for the workers of an open stream.
    for stream in list(_streams):
        stream.close()


def check_batches(source: Source, config: Config, world: int) -> None:
    """Raises InputError where `training_batches` would, or where a pass is too small for batch norm."""
    train, method = config.train, config.method
    passes = world * train.accumulate
    subsets = [("labeled", train.batch_labeled)]
    if method.needs_unlabeled:
        subsets.append(("unlabeled", train.batch_unlabeled))
    for subset, batch in subsets:
        if not source.splits[subset].names:
            raise InputError(f"data.{subset}: no images, but the method needs them")
        if batch % passes:
            raise InputError(
                f"train.batch_{subset}: {batch} is not a multiple of {world} processes x train.accumulate "
                f"{train.accumulate}"
            )
    if method.mixes_pairs and train.batch_unlabeled // passes < 2:
        raise InputError(
            f"train.batch_unlabeled: {train.batch_unlabeled} leaves one image to each pass of each of "
            f"{world} processes, but mix {method.mixing} needs at least 2"
        )
    stride = config.model.output_stride
    synchronized = train.sync_bn and world > 1
    smallest = method.smallest_pass(train.batch_labeled // passes, train.batch_unlabeled // passes)
    if max(config.data.crop) <= stride and smallest == 1 and not synchronized:
        raise InputError(
            f"data.crop: {config.data.crop} leaves one pixel at model.output_stride {stride}, and a pass of "
            "one image then has no batch-norm statistics: enlarge data.crop, or raise train.batch_labeled "
            "or train.batch_unlabeled to two images a pass"
        )


def _augmented(
    steps: MicroSteps, config: Config, start: int, device: torch.device
) -> Generator[Batch, None, None]:
    def place(decoded: DecodedBatch) -> Batch:
        with part("weak augmentation"):
            return _placed(decoded, config, device)

    micro_steps = decoded_micro_steps(steps, start, config.data.workers, device)
    with contextlib.closing(micro_steps):
        yield from prefetched(micro_steps, place, device)


def _placed(decoded: DecodedBatch, config: Config, device: torch.device) -> Batch:
    labeled_image, label, _ = _weak(decoded.labeled, config, device)
    unlabeled = None
    if decoded.unlabeled is not None:
        image, _, inside = _weak(decoded.unlabeled.images, config, device)
        unlabeled = UnlabeledBatch(image, inside, decoded.unlabeled.strong.to(device))
    return Batch(labeled_image, label, unlabeled, decoded.seed.to(device, non_blocking=True))


def _weak(images: DecodedImages, config: Config, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return weak_augment(
        images.pixels.to(device, non_blocking=True),
        images.sizes.to(device, non_blocking=True),
        images.weak.to(device),
        config.data.crop,
        config.data.mean,
    )
