"""Random choices of augmentation and mixing, made on the host from uniform numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prcl_fast.config import AugmentConfig

WEAK_NUMBERS = 4  # uniform numbers per image that `weak_draws` takes
_COLOR_NUMBERS = (
    12  # jitter?, brightness, contrast, saturation, hue, grey?, blur?, sigma, box: area, aspect, y, x
)
STRONG_NUMBERS = _COLOR_NUMBERS + 256  # uniform numbers per image that `strong_draws` takes

# Fraction of the crop that a box of CutMix or CutOut covers (French et al., "Semi-supervised semantic
# segmentation needs strong, varied perturbations", BMVC 2020).
BOX_AREA = (0.25, 0.5)

# Rows: luma Y (grey) and chroma I, Q of NTSC's YIQ.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
GREY = tuple(_YIQ[0])
# Maps of a colour to its grey, to its chroma, and to its chroma turned by a quarter circle.
_TO_GREY = np.tile(_YIQ[0], (3, 1))
_TO_CHROMA = np.eye(3) - _TO_GREY
_QUARTER_TURN = np.linalg.inv(_YIQ) @ np.array([[0, 0, 0], [0, 0, -1], [0, 1, 0]]) @ _YIQ


@dataclass(frozen=True)
class WeakDraws:
    """Geometry of a batch's weak augmentation: scaling, then a crop, then a flip.

    The crop is in pixels of the scaled image. A negative start places the image that far inside the crop.
    """

    scaled: Tensor  # [B, 2] int64: height and width of the scaled image
    start: Tensor  # [B, 2] int64: first row and column of the crop
    flip: Tensor  # [B] bool: mirror the crop from left to right

    def to(self, device: torch.device) -> WeakDraws:
        """A copy on another device; asynchronous from pinned memory."""
        return WeakDraws(*(value.to(device, non_blocking=True) for value in vars(self).values()))


@dataclass(frozen=True)
class StrongDraws:
    """Random choices of a batch's strong augmentation and mixing."""

    color: Tensor  # [B, 3, 3] float32: the linear part of brightness, contrast, saturation, hue and grey
    lift: Tensor  # [B] float32: multiple of the image's mean grey that contrast adds to every channel
    blur: Tensor  # [B, K] float32: one-dimensional kernel, K odd, sums to 1
    box: Tensor  # [B, 4] int64: top, bottom, left, right of the box of CutMix and CutOut, ends excluded
    class_score: Tensor  # [B, 256] float32 in [0, 1): ClassMix pastes the partner's classes of lowest score
    partner: Tensor  # [B] int64: image of the batch that is mixed in; the image itself only if B = 1

    def to(self, device: torch.device) -> StrongDraws:
        """A copy on another device; asynchronous from pinned memory."""
        return StrongDraws(*(value.to(device, non_blocking=True) for value in vars(self).values()))


def weak_draws(
    uniform: np.ndarray, sizes: np.ndarray, crop: Sequence[int], augment: AugmentConfig
) -> WeakDraws:
    """Scale, crop and flip of each image.

    The scale is uniform in `augment.scale`, the position of the crop uniform over the scaled image. Along an
    axis on which the scaled image is smaller than the crop, its position inside the crop is uniform.

    Args:
        uniform: [B, WEAK_NUMBERS] float64 in [0, 1): scale, row, column, flip.
        sizes: [B, 2] int64, native heights and widths.
        crop: height and width of the crop.
    """
    low, high = augment.scale
    scale = low + (high - low) * uniform[:, :1]
    scaled = np.maximum(np.rint(sizes * scale), 1).astype(np.int64)
    room = scaled - np.asarray(crop, dtype=np.int64)
    start = np.sign(room) * np.floor(uniform[:, 1:3] * (np.abs(room) + 1)).astype(np.int64)
    flip = uniform[:, 3] < augment.flip
    return WeakDraws(torch.from_numpy(scaled), torch.from_numpy(start), torch.from_numpy(flip))


def strong_draws(uniform: np.ndarray, crop: Sequence[int], augment: AugmentConfig) -> StrongDraws:
    """Colour, blur and mixing of each image.

    Args:
        uniform: [B, STRONG_NUMBERS] float64 in [0, 1).
        crop: height and width of the images.
    """
    color, lift = _color(uniform, augment)
    return StrongDraws(
        color=torch.from_numpy(color.astype(np.float32)),
        lift=torch.from_numpy(lift.astype(np.float32)),
        blur=torch.from_numpy(_blur(uniform, augment).astype(np.float32)),
        box=torch.from_numpy(_box(uniform, crop)),
        class_score=torch.from_numpy(uniform[:, _COLOR_NUMBERS:].astype(np.float32)),
        partner=torch.from_numpy(_partners(len(uniform))),
    )


def _partners(count: int) -> np.ndarray:
    """int64 [count]: partners in pairs of neighbours; with an odd count the last three form a cycle.

    The partner is random because the order of the images is. A batch divided into even parts keeps its pairs.
    """
    partner = np.arange(count) ^ 1
    if count % 2:
        last = np.arange(max(0, count - 3), count)
        partner[last] = np.roll(last, -1)
    return partner


def _color(uniform: np.ndarray, augment: AugmentConfig) -> tuple[np.ndarray, np.ndarray]:
    """Brightness, contrast, saturation and hue, in this order, as one affine map x -> M x + lift * mean grey.

    Brightness scales the colour, contrast its distance from the image's mean grey, saturation its distance
    from its own grey; hue turns the latter about the grey axis of YIQ. Saturation and hue map greys to
    themselves, so that all four compose exactly. Random grey is saturation 0.
    """
    jitter = uniform[:, 0] < augment.jitter

    def factor(column: int, strength: float) -> np.ndarray:
        return np.where(jitter, 1 + strength * (2 * uniform[:, column] - 1), 1.0)

    brightness = factor(1, augment.brightness)
    contrast = factor(2, augment.contrast)
    saturation = factor(3, augment.saturation)
    turn = 2 * np.pi * (factor(4, augment.hue) - 1)
    saturation = np.where(uniform[:, 5] < augment.grayscale, 0.0, saturation)

    cosine, sine = (value[:, None, None] for value in (np.cos(turn), np.sin(turn)))
    turned = _TO_GREY + saturation[:, None, None] * (cosine * _TO_CHROMA + sine * _QUARTER_TURN)
    return (contrast * brightness)[:, None, None] * turned, (1 - contrast) * brightness


def _blur(uniform: np.ndarray, augment: AugmentConfig) -> np.ndarray:
    """Sampled Gaussians [B, K], cut off at three times the largest sigma; for no blur, a single 1."""
    low, high = augment.blur_sigma
    radius = math.ceil(3 * high) if augment.blur > 0 else 0
    sigma = low + (high - low) * uniform[:, 7:8]
    offset = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offset / sigma) ** 2)
    kernel /= kernel.sum(axis=1, keepdims=True)
    return np.where(uniform[:, 6:7] < augment.blur, kernel, (offset == 0).astype(np.float64))


def _box(uniform: np.ndarray, crop: Sequence[int]) -> np.ndarray:
    """Boxes [B, 4] inside the crop: area uniform in BOX_AREA, aspect ratio log-uniform, position uniform."""
    low, high = BOX_AREA
    area = low + (high - low) * uniform[:, 8]
    height_share = area ** uniform[:, 9]
    edges = []
    for length, share, place in (
        (crop[0], height_share, uniform[:, 10]),
        (crop[1], area / height_share, uniform[:, 11]),
    ):
        extent = np.clip(np.rint(length * share), 1, length).astype(np.int64)
        first = np.floor(place * (length - extent + 1)).astype(np.int64)
        edges += [first, first + extent]
    return np.stack(edges, axis=1)
