"""The 3x3 convolution of ResNets and ASPP, with fast paths for small maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Conv3x3(nn.Conv2d):
    """3x3 convolution without bias that keeps the size of a map, divided by `stride`.

    Kernel rows and columns that only ever read padding, because the map is smaller than the dilation, add
    zeros and are left out.

    On a CPU, a batch with fewer pixels than the layer has channels has a weight far larger than its map.
    PyTorch's convolution is made for large maps; one matrix product is several times faster there. All
    variants agree up to rounding. An exported program has the plain convolution: it holds for every size.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, stride, dilation, dilation, bias=False)

    def forward(self, input: Tensor) -> Tensor:  # [B, in_channels, h, w] -> [B, out_channels, h', w']
        if torch.compiler.is_exporting():
            return super().forward(input)
        images, _, height, width = input.shape
        step = self.dilation[0]
        if step >= height or step >= width:
            rows, row_padding = (slice(1, 2), 0) if step >= height else (slice(None), step)
            columns, column_padding = (slice(1, 2), 0) if step >= width else (slice(None), step)
            weight = self.weight[:, :, rows, columns]
            return F.conv2d(input, weight, None, self.stride, (row_padding, column_padding), self.dilation)
        few = images * height * width <= min(self.in_channels, self.out_channels)
        if input.device.type == "cpu" and self.stride == (1, 1) and few:
            return self._as_product(input)
        return super().forward(input)

    def _as_product(self, x: Tensor) -> Tensor:
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # a view of a channels_last weight
        taps = _Taps.apply(x.permute(0, 2, 3, 1), self.dilation[0])
        return F.linear(taps, weight).permute(0, 3, 1, 2)


class _Taps(torch.autograd.Function):
    """[B, h, w, C] -> [B, h, w, 9 C]: each pixel's 3x3 neighbours `step` apart, zeros beyond the border.

    The backward pass adds the nine gradients into one tensor. Autograd would first copy the gradient of each
    slice into a zero tensor of the full size.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, step: int) -> Tensor:
        ctx.step = step
        padded = F.pad(rows, (0, 0, step, step, step, step))
        return torch.cat(list(_windows(padded, rows.shape[1:3], step)), dim=3)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        batch, height, width, channels = gradient.shape
        step = ctx.step
        padded = gradient.new_zeros(batch, height + 2 * step, width + 2 * step, channels // 9)
        windows = _windows(padded, (height, width), step)
        for window, tap in zip(windows, gradient.chunk(9, dim=3), strict=True):
            window += tap
        return padded[:, step : step + height, step : step + width], None


def _windows(padded: Tensor, size: Sequence[int], step: int) -> Iterator[Tensor]:
    """The nine shifted views of a padded map that a 3x3 convolution reads."""
    height, width = size
    for first_row in (0, step, 2 * step):
        for first_column in (0, step, 2 * step):
            yield padded[:, first_row : first_row + height, first_column : first_column + width]
