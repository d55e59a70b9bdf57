"""Weak (geometric) and strong (photometric) augmentation of a batch, on the batch's device.

All shapes are fixed and nothing is read back to the host. The random choices are small tensors
(`prcl_fast.data.draws`); each function applies them to the whole batch at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prcl_fast.data.draws import GREY, StrongDraws, WeakDraws
from prcl_fast.data.source import IGNORE


@torch.no_grad()
def weak_augment(
    pixels: Tensor, sizes: Tensor, draws: WeakDraws, crop: Sequence[int], fill: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Scales, crops and flips images and labels together, in one gather from the native pixels.

    Images are interpolated bilinearly with half-pixel centres, without a low-pass filter when shrinking; edge
    pixels extend to the image's border. Labels take the nearest pixel. Positions are integers: every device
    reads the same pixels, and crops and flips without scaling return the native values exactly.

    Args:
        pixels: [B, H, W, 4] uint8, contiguous: red, green, blue, label; smaller images are padded below and
            on the right.
        sizes: [B, 2] int64, each image's height and width.
        crop: h, w of the result.
        fill: colour of crop pixels outside the image, in [0, 1].

    Returns:
        image [B, 3, h, w] float32 in [0, 1], channels_last; label [B, h, w] uint8, 255 outside the image;
        inside [B, h, w] bool.
    """
    taps = _taps(sizes, draws, crop)
    rows = _Taps(*(value[:, 0, : crop[0]] for value in taps))
    columns = _Taps(*(value[:, 1, : crop[1]] for value in taps))
    inside = rows.inside[:, :, None] & columns.inside[:, None, :]

    # A pixel with its label is one 32-bit word: a gather moves all four channels at once. They stay together
    # until the end, since contiguous arithmetic on four channels is faster than on three of four.
    words = pixels.view(torch.int32).flatten(1)
    width = pixels.shape[2]
    column_weight = columns.weight[:, :, None].expand(-1, -1, 4).flatten(1)  # [B, 4 w]

    def gather(row: Tensor, column: Tensor) -> Tensor:
        index = (row * width)[:, :, None] + column[:, None, :]
        found = words.gather(1, index.flatten(1)).view(torch.uint8)
        return found.view(len(pixels), crop[0], 4 * crop[1])

    def blend(row: Tensor) -> Tensor:
        left, right = gather(row, columns.lower).float(), gather(row, columns.upper).float()
        return left.lerp_(right, column_weight[:, None, :])

    blended = blend(rows.lower).lerp_(blend(rows.upper), rows.weight[:, :, None])
    image = blended.view(*inside.shape, 4)[..., :3] / 255
    label = gather(rows.nearest, columns.nearest).view(*inside.shape, 4)[..., 3]
    outside = ~inside
    for channel, value in enumerate(fill):
        image[..., channel].masked_fill_(outside, value)
    return image.permute(0, 3, 1, 2), label.masked_fill(outside, IGNORE), inside


class _Taps(NamedTuple):
    """Native pixels of n positions along an axis of the crop; each tensor is [B, n] or [B, 2, n]."""

    lower: Tensor  # int64: the two neighbours to blend ...
    upper: Tensor
    weight: Tensor  # float32: ... and the weight of the upper one
    nearest: Tensor  # int64
    inside: Tensor  # bool


def _taps(sizes: Tensor, draws: WeakDraws, crop: Sequence[int]) -> _Taps:
    """Taps of rows and columns together, n = max(h, w), with half as many small operations.

    Position k of the scaled axis has its centre at (k + 1/2) native / scaled on the native axis.
    """
    native, scaled, start = sizes[:, :, None], draws.scaled[:, :, None], draws.start[:, :, None]
    forward = torch.arange(max(crop), device=sizes.device)
    column = torch.where(draws.flip[:, None], crop[1] - 1 - forward, forward)
    position = torch.stack([forward.expand_as(column), column], dim=1) + start
    inside = (position >= 0) & (position < scaled)
    centre = (2 * torch.minimum(position.clamp(min=0), scaled - 1) + 1) * native  # times 2 scaled
    nearest = centre // (2 * scaled)
    below = torch.div(centre - scaled, 2 * scaled, rounding_mode="floor")
    weight = ((centre - scaled) - below * (2 * scaled)).float() / (2 * scaled).float()
    return _Taps(below.clamp(min=0), torch.minimum(below + 1, native - 1), weight, nearest, inside)


@torch.no_grad()
def strong_augment(image: Tensor, draws: StrongDraws) -> Tensor:
    """Colour jitter, random grey and Gaussian blur.

    Colour is one affine map per image, clamped to [0, 1] once at its end. Differences from the usual chain of
    image operations: the order is brightness, contrast, saturation, hue for every image; no clamping between
    them; hue turns the chroma plane of YIQ. An image without any of these keeps its exact values.

    Args:
        image: [B, 3, h, w] float32 in [0, 1].

    Returns:
        [B, 3, h, w] float32 in [0, 1], contiguous.
    """
    image = image.contiguous()
    mean = image.mean(dim=(2, 3))
    mean_grey = sum(mean[:, channel] * weight for channel, weight in enumerate(GREY))
    color = draws.color[..., None, None]
    mixed = image[:, 0:1] * color[:, :, 0]
    mixed = mixed.addcmul_(image[:, 1:2], color[:, :, 1]).addcmul_(image[:, 2:3], color[:, :, 2])
    mixed = mixed.add_((draws.lift * mean_grey)[:, None, None, None]).clamp_(0, 1)
    return mixed if draws.blur.shape[1] == 1 else _blur(mixed, draws.blur)


def _blur(image: Tensor, kernel: Tensor) -> Tensor:
    """Blurs each image of [B, 3, h, w] with its kernel of [B, K] along both axes, inside the image only.

    Computed as products with banded matrices; a convolution with one kernel per image has 3 B groups and is
    several times slower on a CPU.
    """
    with torch.autocast(image.device.type, enabled=False):
        along_rows, along_columns = _band(kernel, image.shape[2]), _band(kernel, image.shape[3])
        return along_rows[:, None] @ (image @ along_columns[:, None].transpose(2, 3))


def _band(kernel: Tensor, length: int) -> Tensor:
    """[B, K] -> [B, n, n]: row i holds the kernel centred at i, cut at the ends and scaled to sum 1."""
    taps = kernel.shape[1]
    position = torch.arange(length, device=kernel.device)
    tap = position - position[:, None] + taps // 2
    band = kernel[:, tap.clamp(0, taps - 1)] * ((tap >= 0) & (tap < taps))
    return band / band.sum(dim=2, keepdim=True)


def normalize(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(image - mean) / std per channel: [B, 3, H, W] floating point -> the same type, channels_last."""
    channels = [(image[:, c] - shift) / scale for c, (shift, scale) in enumerate(zip(mean, std, strict=True))]
    return torch.stack(channels, dim=-1).permute(0, 3, 1, 2)
