"""The collectives of one training step, and their time by formula.

Collectives over N processes use a ring. With S bytes given by each process, an all-reduce sends
2 (N - 1) / N S bytes from each process, an all-gather (N - 1) S; each receives as much. The time of a
collective is its bytes over the bandwidth of a process, plus the latency for each of the log2 N levels of a
tree, with which libraries send small messages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.step.data import DATA_SETS
from bench.step.setup import LOSSES
from prcl_fast.config import Config
from prcl_fast.methods import build_method

GRADIENTS, NORM_FORWARD, NORM_BACKWARD = "gradients", "batch norm, forward", "batch norm, backward"
STATISTICS, COUNTS, MEANS = "prototype statistics", "pixel counts", "means of the losses"
STOP, GATHERING = "stop flag", "gathered features"
PURPOSES = (GRADIENTS, NORM_FORWARD, NORM_BACKWARD, STATISTICS, COUNTS, MEANS, STOP)

_BUCKET_BYTES = 25 << 20  # DistributedDataParallel's default
_CACHED_PIXEL = 4  # bytes of a decoded pixel and its label in data.cache


@dataclass(frozen=True)
class Network:
    """A kind of network: latency of a message, and bandwidth of one process."""

    name: str
    latency: float  # seconds
    bandwidth: float  # bytes a second

    def seconds(self, collectives: Iterable[Collective], processes: int) -> float:
        """The time of the collectives, one after another."""
        levels = math.ceil(math.log2(processes))
        return sum(levels * self.latency + c.sent(processes) / self.bandwidth for c in collectives)


# Typical values, assumed for every process and every distance.
NETWORKS = (
    Network("NVLink, 300 GB/s, 10 us", 10e-6, 300e9),
    Network("InfiniBand, 200 Gb/s, 20 us", 20e-6, 25e9),
    Network("Ethernet, 10 Gb/s, 100 us", 100e-6, 1.25e9),
)


@dataclass(frozen=True)
class Collective:
    """A collective of one step.

    Attributes:
        gives: bytes given by each process.
        gathers: an all-gather; else an all-reduce.
        hidden: it overlaps with computation.
    """

    purpose: str
    gives: int
    gathers: bool = False
    hidden: bool = False

    def sent(self, processes: int) -> float:
        """Bytes that each process sends, and receives, by a ring."""
        if self.gathers:
            return float((processes - 1) * self.gives)
        return 2 * (processes - 1) / processes * self.gives


@dataclass(frozen=True)
class Shape:
    """The sizes of a configuration's step, from its method on the meta device.

    Attributes:
        parameters: number of learned parameters.
        buckets: numbers of gradients in each bucket, in the order of the backward pass on CUDA.
        channels: of every trained batch norm.
        height, width: of the feature maps.
        images: labeled and unlabeled images of a step, of all processes.
        pairs: mixing needs two images of a process.
    """

    parameters: int
    buckets: tuple[int, ...]
    channels: tuple[int, ...]
    classes: int
    dim: int
    height: int
    width: int
    crop: tuple[int, int]
    images: tuple[int, int]
    pairs: bool


def shape_of(config: Config, classes: int) -> Shape:
    """The shape of a configuration's step, without computing it."""
    with torch.device("meta"):
        method = build_method(config, classes).train()
        height, width = config.data.crop
        # Two images, because batch norm in training needs more than one value.
        maps = method.student(torch.zeros(2, 3, height, width), representations=False).logits
    learned = [parameter for parameter in method.parameters() if parameter.requires_grad]
    norms = [m for m in method.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    return Shape(
        parameters=sum(parameter.numel() for parameter in learned),
        buckets=_buckets(learned[::-1]),
        channels=tuple(norm.num_features for norm in norms),
        classes=classes,
        dim=config.model.dim,
        height=maps.shape[2],
        width=maps.shape[3],
        crop=(height, width),
        images=(config.train.batch_labeled, config.train.batch_unlabeled),
        pairs=config.method.mixes_pairs,
    )


def images_of_a_process(shape: Shape, processes: int) -> tuple[int, int]:
    """Labeled and unlabeled images: the configuration's batch divided, or 2 + 2 if it is not divisible."""
    labeled, unlabeled = (count / processes for count in shape.images)
    whole = labeled.is_integer() and unlabeled.is_integer()
    return (int(labeled), int(unlabeled)) if whole and unlabeled >= 1 + shape.pairs else (2, 2)


def collectives(shape: Shape) -> list[Collective]:
    """The collectives of a step with one micro-batch and train.sync_bn."""
    *early, last = (4 * size for size in shape.buckets)
    number = 4  # bytes of a float32
    return [
        Collective(COUNTS, 3 * 8, hidden=True),
        *(Collective(NORM_FORWARD, (2 * c + 1) * number, gathers=True) for c in shape.channels),
        Collective(STATISTICS, shape.classes * (2 * shape.dim + 4) * number),
        Collective(MEANS, len(LOSSES) * number, hidden=True),
        *(Collective(NORM_BACKWARD, 2 * c * number) for c in shape.channels),
        *(Collective(GRADIENTS, size, hidden=True) for size in early),
        Collective(GRADIENTS, last),  # the first layers' gradients come last and overlap with nothing
        Collective(STOP, number, hidden=True),
    ]


def gathering(shape: Shape, images: tuple[int, int]) -> list[Collective]:
    """The all-gathers of the authors' public code in place of the statistics, for `images` of each process.

    For the contrast: mean, variance and one-hot label of every pixel of the feature maps. For mixing: the
    unlabeled images with pseudo-label (int64) and confidence. All but the pseudo-label are float32.
    """
    labeled, unlabeled = images
    features = (labeled + unlabeled) * shape.height * shape.width * 4
    pixels = unlabeled * shape.crop[0] * shape.crop[1]
    gives = (features * shape.dim, features * shape.dim, features * shape.classes)
    return [
        Collective(GATHERING, size, gathers=True) for size in (*gives, 12 * pixels, 8 * pixels, 4 * pixels)
    ]


def table(shape: Shape, processes: Sequence[int]) -> list[dict[str, object]]:
    """A row for each number of processes: bytes sent by a process in a step, and milliseconds by network."""
    own = collectives(shape)
    return [_row(shape, own, count) for count in processes]


def bytes_text(value: float) -> str:
    """Three digits and a unit: 21.7 kB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError


def _row(shape: Shape, own: list[Collective], processes: int) -> dict[str, object]:
    images = images_of_a_process(shape, processes)
    theirs = gathering(shape, images)
    instead = [*(c for c in own if c.purpose != STATISTICS), *theirs]
    exposed, exposed_instead = ([c for c in all_of if not c.hidden] for all_of in (own, instead))
    voc = DATA_SETS["voc"]
    return {
        "processes": processes,
        "images_of_a_process": images,
        "sent_bytes": {
            purpose: sum(c.sent(processes) for c in own if c.purpose == purpose) for purpose in PURPOSES
        },
        "gathering_bytes": sum(c.sent(processes) for c in theirs),
        "read_bytes": sum(images) * voc.height * voc.width * _CACHED_PIXEL,
        "collectives": len(own) if processes > 1 else 0,
        "ms": {
            network.name: {
                "all": 1e3 * network.seconds(own, processes),
                "exposed": 1e3 * network.seconds(exposed, processes),
                "gathering": 1e3 * network.seconds(instead, processes),
                "gathering, exposed": 1e3 * network.seconds(exposed_instead, processes),
            }
            for network in NETWORKS
        },
    }


def _buckets(parameters: list[nn.Parameter]) -> tuple[int, ...]:
    """Number of values in each bucket of DistributedDataParallel, for gradients in this order."""
    limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, _BUCKET_BYTES]
    tensors: list[Tensor] = list(parameters)
    found, _ = dist._compute_bucket_assignment_by_size(tensors, limits)
    return tuple(sum(parameters[index].numel() for index in bucket) for bucket in found)
