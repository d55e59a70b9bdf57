"""Labels and features for the contrast, distributed as in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.ops.case import Options, Sizes

DELTA_S = 0.8
_VALID_FROM = 0.25  # confidence of the pixels that take part
_OBJECT_SHARE = 1 / 3  # of the pixels; all others are background
_VOID = 255


@dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
        mu, var: [B, D, h, w], channels_last.
        label: [B, h, w] uint8, 255 = not labeled.
        valid, hard: [B, h, w] bool.
        confidence: [B, h, w] float32.
        seed: int64 [2].
    """

    mu: Tensor
    var: Tensor
    label: Tensor
    valid: Tensor
    hard: Tensor
    confidence: Tensor
    seed: Tensor


def batches(sizes: Sizes, options: Options) -> list[Batch]:
    """One batch for each input set of the options, all different."""
    return [_batch(sizes, options, number) for number in range(options.input_sets)]


def _batch(sizes: Sizes, options: Options, number: int) -> Batch:
    host = torch.Generator().manual_seed(number)
    label = labels(sizes, options.labels, host)
    confidence = torch.nn.functional.interpolate(
        torch.rand(sizes.batch, 1, 16, 16, generator=host), (sizes.height, sizes.width), mode="bilinear"
    )[:, 0]
    confidence = (0.5 + 1.5 * (confidence - 0.5)).clamp(0.0, 1.0)
    valid = confidence >= _VALID_FROM
    hard = valid & (confidence < DELTA_S)

    device = torch.Generator(options.device).manual_seed(number)
    place: dict[str, Any] = {"device": options.device, "generator": device}
    rows = sizes.pixels, sizes.dim
    centre = 0.5 * torch.randn(256, sizes.dim, **place)  # of every label, void included
    mu = torch.randn(rows, **place) + centre[label.flatten().long().to(options.device)]
    var = torch.rand(rows, **place).mul_(0.9).add_(0.05)
    return Batch(
        mu=_features(mu, sizes, options.dtype),
        var=_features(var, sizes, options.dtype),
        label=label.to(options.device),
        valid=valid.to(options.device),
        hard=hard.to(options.device),
        confidence=confidence.to(options.device),
        seed=torch.tensor([7, number], device=options.device),
    )


def labels(sizes: Sizes, kind: str, generator: torch.Generator) -> Tensor:
    """[B, h, w] uint8 with every class, "uniform" (each pixel drawn alone) or "coherent".

    Coherent labels are like VOC's: background (class 0) on two thirds, and ellipses of the other classes with
    a void rim, whose areas decrease with the class's number.
    """
    shape = (sizes.batch, sizes.height, sizes.width)
    if kind == "uniform":
        return torch.randint(sizes.classes, shape, generator=generator, dtype=torch.uint8)
    label = torch.zeros(shape, dtype=torch.uint8)
    y = torch.linspace(0.0, 1.0, sizes.height)[:, None]
    x = torch.linspace(0.0, 1.0, sizes.width)
    for image in range(sizes.batch):
        # Every class is in some image; with more images than classes, classes repeat.
        own = list(range(1 + image % (sizes.classes - 1), sizes.classes, sizes.batch))
        weight = torch.tensor([1.0 / (3 + number) for number in own])
        # From large to small, so that no ellipse hides a smaller one.
        for number, share in zip(own, (_OBJECT_SHARE * weight / weight.sum()).tolist(), strict=True):
            radius = (share / torch.pi) ** 0.5
            stretch = 0.7 + 0.6 * torch.rand((), generator=generator)
            centre_y, centre_x = (radius + (1 - 2 * radius) * torch.rand(2, generator=generator)).unbind()
            distance = ((y - centre_y) / (radius * stretch)) ** 2 + ((x - centre_x) * stretch / radius) ** 2
            label[image][distance < 1.1] = _VOID
            label[image][distance < 1.0] = number
    return label


def _features(rows: Tensor, sizes: Sizes, dtype: torch.dtype) -> Tensor:
    """[P, D] -> [B, D, h, w], channels_last."""
    image = rows.to(dtype).view(sizes.batch, sizes.height, sizes.width, sizes.dim)
    return image.permute(0, 3, 1, 2)
