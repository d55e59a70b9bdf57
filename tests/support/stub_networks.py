"""Networks of one layer and a batch of a few pixels: a method's losses can be written down beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prcl_fast.config import AugmentConfig
from prcl_fast.data.batches import Batch, UnlabeledBatch
from prcl_fast.data.draws import STRONG_NUMBERS, StrongDraws, strong_draws
from prcl_fast.models import network
from prcl_fast.models.network import NetworkOutput

IGNORE = 255


class SmallBackbone(nn.Sequential):
    """In place of a ResNet: four strided convolutions, a thousandth of its parameters."""

    low_channels, out_channels = 16, 32

    def __init__(self, *_: object, **__: object) -> None:
        channels = (3, 16, self.low_channels, 32, self.out_channels)
        super().__init__(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
                for a, b in pairwise(channels)
            )
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low = self[1](self[0](x))
        return low, self[3](self[2](low))


@contextmanager
def small_backbones() -> Iterator[None]:
    """Networks that are built within the block have a SmallBackbone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "ResNet", SmallBackbone)
        yield


class PixelNetwork(nn.Module):
    """Sees every second pixel on its own: features by a 1x1 convolution, logits from them.

    With `prototypes` per class, those of an image lie around the mean of its features, and a pixel's scores
    are their dot products with its features; the projection is the square of the features.

    Attributes:
        calls: of each forward, whether it was in training mode and whether it made a graph.
    """

    def __init__(self, classes: int, dim: int = 4, *, prototypes: int = 0) -> None:
        super().__init__()
        self.embed, self.classify = nn.Conv2d(3, dim, 1), nn.Conv2d(dim, classes, 1)
        self.queries = nn.Parameter(torch.randn(classes, prototypes, dim)) if prototypes else None
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor, *, representations: bool = True) -> NetworkOutput:
        self.calls.append((self.training, torch.is_grad_enabled()))
        features = self.embed(x[:, :, ::2, ::2])
        if self.queries is None:
            return NetworkOutput(self.classify(features), None, None, features)
        prototypes = self.queries + features.mean((2, 3))[:, None, None]
        scores = torch.einsum("bcnd,bdhw->bcnhw", prototypes, features)
        projection = features.square() if representations else None
        return NetworkOutput(scores.sum(2), None, None, features, scores.flatten(1, 2), projection)


def small_batch(classes: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Batch:
    """Two labeled and two unlabeled images of 7 x 9 pixels, some of them ignored; the networks' are 4 x 5."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.rand(4, 3, 7, 9, generator=draw, dtype=torch.float64).to(dtype)
    label = torch.randint(classes, (2, 7, 9), generator=draw)
    label[torch.rand(label.shape, generator=draw) < 0.2] = IGNORE
    inside = torch.ones(2, 7, 9, dtype=torch.bool)
    inside[1, :, :2] = False
    uniform = np.random.default_rng(seed).random((2, STRONG_NUMBERS))
    strong = strong_draws(uniform, (7, 9), AugmentConfig())
    unlabeled = UnlabeledBatch(images[2:], inside, strong)
    return Batch(images[:2], label.to(torch.uint8), unlabeled, torch.tensor([3, seed]))


def upsampled(scores: Tensor, size: tuple[int, int] = (7, 9)) -> Tensor:
    return F.interpolate(scores, size, mode="bilinear", align_corners=True)


def cross_entropy(scores: Tensor, label: Tensor, counts: Tensor | None = None) -> Tensor:
    """The mean over the pixels that are not ignored, one by one; those where `counts` is False give 0."""
    full = upsampled(scores)
    total, kept = scores.new_zeros(()), 0
    for b, y, x in product(*map(range, label.shape)):
        k = int(label[b, y, x])
        if k == IGNORE:
            continue
        kept += 1
        if counts is None or counts[b, y, x]:
            total = total + torch.logsumexp(full[b, :, y, x], 0) - full[b, k, y, x]
    return total / max(kept, 1)


def cut_mixed(values: Tensor, draws: StrongDraws) -> Tensor:
    """The partner's pixels in each image's box: [B, ..., h, w]."""
    result = values.clone()
    for b, (top, bottom, left, right) in enumerate(draws.box.tolist()):
        result[b, ..., top:bottom, left:right] = values[draws.partner[b], ..., top:bottom, left:right]
    return result
