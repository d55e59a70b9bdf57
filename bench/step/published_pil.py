"""The augmentation of the published algorithm: image by image, with Pillow, on the host."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from prcl_fast.config import AugmentConfig
from prcl_fast.data.source import IGNORE

Maps = list[tuple[Image.Image, float]]  # a map of the picture's size, and its value outside the picture


def to_tensor(picture: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """[3, h, w] float32, normalised."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div_(255)
    return pixels.sub_(torch.tensor(mean)[:, None, None]).div_(torch.tensor(std)[:, None, None])


def to_picture(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """The inverse of `to_tensor`."""
    pixels = image * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    pixels = pixels.clamp_(0, 1).mul_(255).round_().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def geometric(
    picture: Image.Image,
    maps: Maps,
    *,
    scale: Sequence[float],
    crop: Sequence[int],
    flip: float,
    fill: Sequence[float],
) -> tuple[Image.Image, list[Image.Image]]:
    """Random scale, crop and flip, the same for the picture and the maps."""
    height, width = crop
    factor = random.uniform(*scale)
    size = (max(1, int(picture.width * factor)), max(1, int(picture.height * factor)))
    colour = tuple(round(255 * value) for value in fill)
    layers: list[tuple[Image.Image, Image.Resampling, Any]] = [(picture, Image.Resampling.BILINEAR, colour)]
    layers += [(layer, Image.Resampling.NEAREST, value) for layer, value in maps]
    left = random.randint(0, max(0, size[0] - width))
    top = random.randint(0, max(0, size[1] - height))
    mirror = random.random() < flip
    results = []
    for layer, resampling, outside in layers:
        if layer.size != size:
            layer = layer.resize(size, resampling)
        if size[0] < width or size[1] < height:
            padded = Image.new(layer.mode, (max(size[0], width), max(size[1], height)), outside)
            padded.paste(layer, (0, 0))
            layer = padded
        layer = layer.crop((left, top, left + width, top + height))
        results.append(layer.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else layer)
    return results[0], results[1:]


def photometric(picture: Image.Image, augment: AugmentConfig) -> Image.Image:
    """Colour jitter, random grey and Gaussian blur."""
    if random.random() < augment.jitter:
        for enhance, strength in (
            (ImageEnhance.Brightness, augment.brightness),
            (ImageEnhance.Contrast, augment.contrast),
            (ImageEnhance.Color, augment.saturation),
        ):
            picture = enhance(picture).enhance(1 + random.uniform(-strength, strength))
        picture = _turn_hue(picture, random.uniform(-augment.hue, augment.hue))
    if random.random() < augment.grayscale:
        picture = picture.convert("L").convert("RGB")
    if random.random() < augment.blur:
        picture = picture.filter(ImageFilter.GaussianBlur(random.uniform(*augment.blur_sigma)))
    return picture


def _turn_hue(picture: Image.Image, turn: float) -> Image.Image:
    hue, saturation, value = picture.convert("HSV").split()
    shift = round(255 * turn)
    hue = hue.point([(entry + shift) % 256 for entry in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def classmix(image: Tensor, label: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pastes half of the classes of another image of the batch onto each one.

    Args:
        image: [B, 3, h, w].
        label: [B, h, w] int64.
        confidence: [B, h, w].
    """
    count = len(image)
    shift = random.randint(1, count - 1)
    images, labels, confidences = [], [], []
    for own in range(count):
        other = (own + shift) % count
        classes = label[other].unique()
        classes = classes[classes != IGNORE]
        chosen = classes[torch.randperm(len(classes), device=classes.device)[: (len(classes) + 1) // 2]]
        pasted = torch.zeros_like(label[other], dtype=torch.bool)
        for number in chosen:
            pasted |= label[other] == number
        images.append(torch.where(pasted, image[other], image[own]))
        labels.append(torch.where(pasted, label[other], label[own]))
        confidences.append(torch.where(pasted, confidence[other], confidence[own]))
    return torch.stack(images), torch.stack(labels), torch.stack(confidences)
