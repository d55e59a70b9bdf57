"""ResNet backbones for dense prediction: torchvision's parameter names, no classifier, dilation for stride.

Source: He et al., "Deep Residual Learning for Image Recognition" (2016); the stride of a bottleneck sits on
its 3x3 convolution, as in torchvision. The deep stem is the one of He et al., "Bag of Tricks" (2019).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prcl_fast.errors import InputError
from prcl_fast.models.batch_norm import BatchNorm2d


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """The projection of a residual branch whose shape changes; None where the identity fits."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), BatchNorm2d(out_channels)
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions. `first_dilation` is that of the convolution that carried the stride."""

    expansion = 1

    def __init__(
        self, in_channels: int, channels: int, stride: int, first_dilation: int, dilation: int
    ) -> None:
        super().__init__()
        self.conv1 = Conv3x3(in_channels, channels, stride, first_dilation)
        self.bn1 = BatchNorm2d(channels)
        self.conv2 = Conv3x3(channels, channels, dilation=dilation)
        self.bn2 = BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions. The only 3x3 carries the stride, hence `first_dilation`."""

    expansion = 4

    def __init__(
        self, in_channels: int, channels: int, stride: int, first_dilation: int, dilation: int
    ) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = BatchNorm2d(channels)
        self.conv2 = Conv3x3(channels, channels, stride, first_dilation)
        self.bn2 = BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


BLOCKS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}

STRIDES: dict[int, tuple[int, int, int, int]] = {16: (1, 2, 2, 1), 8: (1, 2, 1, 1)}
DILATIONS: dict[int, tuple[int, int, int, int]] = {16: (1, 1, 1, 2), 8: (1, 1, 2, 4)}


class ResNet(nn.Module):
    """ResNet without its pooling and classifier, at output stride 8 or 16.

    Where a stage loses its stride, everything after the convolution that carried it is dilated instead: the
    features at every second pixel are then exactly those of the strided network, so ImageNet weights stay
    valid. Unlike torchvision's, basic blocks may be dilated too.

    Args:
        depth: 18, 34, 50 or 101.
        stem: "plain" (7x7 convolution) or "deep" (three 3x3 convolutions, 128 channels).
        output_stride: 8 or 16.
        base_width: channels of the first stage, 64 in the published networks; everything is in proportion.

    Attributes:
        low_channels, out_channels: channels of the two maps that `forward` returns.
        classifier_keys: first parts of the keys in torchvision's files that are of the classifier.

    Raises:
        InputError: an argument is none of the values above.
    """

    classifier_keys = ("fc.",)

    def __init__(
        self, depth: int, stem: str = "plain", output_stride: int = 16, *, base_width: int = 64
    ) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise InputError(f"depth: {depth} is not one of {sorted(BLOCKS)}")
        if stem not in ("plain", "deep"):
            raise InputError(f"stem: '{stem}' is neither 'plain' nor 'deep'")
        if output_stride not in STRIDES:
            raise InputError(f"output_stride: {output_stride} is neither 8 nor 16")
        block, repeats = BLOCKS[depth]

        stem_channels = base_width if stem == "plain" else 2 * base_width
        self.conv1 = self._stem(stem, base_width)
        self.bn1 = BatchNorm2d(stem_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        stages: list[nn.Sequential] = []
        in_channels, previous_dilation = stem_channels, 1
        widths = [base_width << stage for stage in range(4)]
        settings = zip(widths, repeats, STRIDES[output_stride], DILATIONS[output_stride], strict=True)
        for channels, repeat, stride, dilation in settings:
            blocks: list[nn.Module] = [block(in_channels, channels, stride, previous_dilation, dilation)]
            in_channels, previous_dilation = channels * block.expansion, dilation
            blocks += [block(in_channels, channels, 1, dilation, dilation) for _ in range(repeat - 1)]
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages

        self.low_channels = widths[0] * block.expansion
        self.out_channels = widths[-1] * block.expansion
        self._initialise()

    @staticmethod
    def _stem(stem: str, width: int) -> nn.Module:
        if stem == "plain":
            return nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        return nn.Sequential(
            Conv3x3(3, width, stride=2),
            BatchNorm2d(width),
            nn.ReLU(inplace=True),
            Conv3x3(width, width),
            BatchNorm2d(width),
            nn.ReLU(inplace=True),
            Conv3x3(width, 2 * width),
        )

    def _initialise(self) -> None:
        # BatchNorm2d already starts at weight 1 and bias 0.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features of two stages.

        Args:
            x: images [B, 3, H, W].

        Returns:
            The features of layer1 [B, low_channels, ceil(H/4), ceil(W/4)] and of layer4
            [B, out_channels, ceil(H/output_stride), ceil(W/output_stride)].
        """
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        low = self.layer1(x)
        return low, self.layer4(self.layer3(self.layer2(low)))


class Conv3x3(nn.Conv2d):
    """3x3 convolution without bias that keeps the size of a map, divided by `stride`.

    Rows and columns of the kernel that meet the padding alone, as in a map smaller than the dilation, add
    zeros and are left out.

    On a CPU, where a batch has fewer output pixels than the layer has channels, the weight is far larger than
    the map, and the library's kernels, made for large maps, take several times longer than the same sum
    written as one matrix product. All ways agree up to rounding.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, stride, dilation, dilation, bias=False)

    def forward(self, input: Tensor) -> Tensor:  # [B, in_channels, h, w] -> [B, out_channels, h', w']
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
    slice into zeros of the whole size.
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
    """The nine views of the padded rows that a 3x3 convolution multiplies."""
    height, width = size
    for first_row in (0, step, 2 * step):
        for first_column in (0, step, 2 * step):
            yield padded[:, first_row : first_row + height, first_column : first_column + width]
