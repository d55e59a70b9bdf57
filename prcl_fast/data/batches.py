"""Training batches: workers decode, the device augments, and every batch is a function of its number."""

from __future__ import annotations

import atexit
import contextlib
import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from prcl_fast.config import Config
from prcl_fast.config.methods import UnlabeledConfig
from prcl_fast.data.augment import weak_augment
from prcl_fast.data.cache.decoded import ImageCache, open_cache
from prcl_fast.data.draws import Purpose, StrongDraws, generator
from prcl_fast.data.micro_steps import Loaded, MicroSteps, Pixels
from prcl_fast.data.prefetch import on_device
from prcl_fast.data.source import Source
from prcl_fast.data.workers import loaded_micro_steps
from prcl_fast.errors import InputError
from prcl_fast.step_parts import part


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


def training_cache(
    source: Source, config: Config, *, unlabeled: bool, say: Callable[[str], None] | None = None
) -> ImageCache | None:
    """The images of `data.cache`, built if need be; None where the configuration has no cache.

    Args:
        unlabeled: False leaves the unlabeled images out.
        say: takes lines about the building.

    Raises:
        InputError: an image that cannot be read, or, naming data.cache, not enough room or no access.
    """
    if config.data.cache == "none":
        return None
    subsets = ("labeled", "unlabeled") if unlabeled else ("labeled",)
    return open_cache(source, config.data, subsets, say)


def training_batches(
    source: Source,
    config: Config,
    *,
    start: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device,
    unlabeled: bool,
    cache: ImageCache | None = None,
) -> Generator[Batch, None, None]:
    """Micro-batches number start, start + 1, ... without end; `close()` ends the worker processes.

    Images and their augmentation are drawn for the whole step and then shared out, so that the union over
    micro-steps and processes is the same for every number of processes and every `train.accumulate`; so are
    partners for mixing, which come from the same micro-batch, wherever that holds an even number of images.

    Args:
        rank, world: this process and the number of processes; each gets batch / (world * accumulate) images.
        unlabeled: False leaves the unlabeled images out.
        cache: what `training_cache` gave; None opens it in this call.

    Raises:
        InputError: a batch size that cannot be shared out, an empty split, an image that cannot be read, or
            no room for `data.cache`.
        WorkerDiedError: from the generator: a worker process was killed.
    """
    _check(source, config, world, unlabeled)
    steps = MicroSteps(
        source,
        config,
        rank=rank,
        world=world,
        seed=rank_seed(config.seed, rank),
        unlabeled=unlabeled,
        cache=cache or training_cache(source, config, unlabeled=unlabeled),
    )
    stream = _augmented(steps, config, start, device)
    _streams.add(stream)
    return stream


def images_of_step(source: Source, config: Config, step: int, *, unlabeled: bool) -> list[str]:
    """The images of optimiser step `step`, over all processes and micro-steps."""
    whole = config.model_copy(update={"train": config.train.model_copy(update={"accumulate": 1})})
    return MicroSteps(source, whole, rank=0, world=1, seed=0, unlabeled=unlabeled, cache=None).names(step)


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
    mix = config.method.mix if isinstance(config.method, UnlabeledConfig) else "none"
    if unlabeled and mix in ("cutmix", "classmix") and train.batch_unlabeled // parts < 2:
        raise InputError(
            f"train.batch_unlabeled: {train.batch_unlabeled} leaves one image to each pass of each of "
            f"{world} processes, but mix {mix} needs at least 2"
        )


def _augmented(
    steps: MicroSteps, config: Config, start: int, device: torch.device
) -> Generator[Batch, None, None]:
    def place(loaded: Loaded) -> Batch:
        with part("weak augmentation"):
            return _placed(loaded, config, device)

    micro_steps = loaded_micro_steps(steps, start, config.data.workers, pin=device.type == "cuda")
    with contextlib.closing(micro_steps):
        yield from on_device(micro_steps, place, device)


def _placed(loaded: Loaded, config: Config, device: torch.device) -> Batch:
    labeled_image, label, _ = _weak(loaded.labeled, config, device)
    unlabeled_image, inside = None, None
    if loaded.unlabeled is not None:
        unlabeled_image, _, inside = _weak(loaded.unlabeled, config, device)
    strong = None if loaded.strong is None else loaded.strong.to(device)
    seed = loaded.seed.to(device, non_blocking=True)
    return Batch(labeled_image, label, unlabeled_image, inside, strong, seed)


def _weak(pixels: Pixels, config: Config, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return weak_augment(
        pixels.pixels.to(device, non_blocking=True),
        pixels.sizes.to(device, non_blocking=True),
        pixels.weak.to(device),
        config.data.crop,
        config.data.mean,
    )
