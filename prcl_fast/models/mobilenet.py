"""MobileNetV2 for dense prediction: torchvision's parameter names, no classifier, dilated stages.

Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (2018), table 2 at width 1.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from prcl_fast.errors import InputError
from prcl_fast.models.batch_norm import BatchNorm2d

# Expansion t, channels c, blocks n, stride s of the first block: table 2 of the paper.
STAGES: tuple[tuple[int, int, int, int], ...] = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_CHANNELS = 32
LOW_STAGE = 1  # of STAGES, the last at stride 4


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution, linear 1x1 projection; a residual sum if shapes agree.

    `dilation` applies to the depthwise convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, expansion: int, stride: int, dilation: int
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(_conv_bn_relu6(nn.Conv2d(in_channels, hidden, 1, bias=False)))
        depthwise = nn.Conv2d(hidden, hidden, 3, stride, dilation, dilation, groups=hidden, bias=False)
        layers += [
            _conv_bn_relu6(depthwise),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            BatchNorm2d(out_channels),
        ]
        self.conv = nn.Sequential(*layers)
        self.adds = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.adds:
            y += x
        return y


class MobileNetV2(nn.Module):
    """MobileNetV2 of width 1 up to its last inverted residual, at output stride 8 or 16.

    The 1280-channel convolution of the classifier (features.18) is left out, as in DeepLabv3+ on MobileNetV2:
    it widens the map fourfold for a linear classifier, which the ASPP replaces.

    A stage without its stride dilates all later convolutions instead, as in `ResNet`: ImageNet weights stay
    valid.

    Args:
        output_stride: 8 or 16.

    Attributes:
        low_channels, out_channels: channels of the two maps that `forward` returns, 24 and 320.
        classifier_keys: prefixes of the classifier's keys in torchvision's files.

    Raises:
        InputError: output_stride is neither 8 nor 16.
    """

    classifier_keys = ("classifier.", "features.18.")

    def __init__(self, output_stride: int = 16) -> None:
        super().__init__()
        if output_stride not in (8, 16):
            raise InputError(f"output_stride: {output_stride} is neither 8 nor 16")
        stem = nn.Conv2d(3, STEM_CHANNELS, 3, stride=2, padding=1, bias=False)
        layers: list[nn.Module] = [_conv_bn_relu6(stem)]
        channels, total_stride, dilation = STEM_CHANNELS, 2, 1
        for stage, (expansion, out_channels, blocks, first_stride) in enumerate(STAGES):
            stride, following = first_stride, dilation
            if total_stride * stride > output_stride:
                stride, following = 1, dilation * first_stride
            total_stride *= stride
            layers.append(InvertedResidual(channels, out_channels, expansion, stride, dilation))
            channels, dilation = out_channels, following
            layers += [
                InvertedResidual(channels, channels, expansion, 1, dilation) for _ in range(blocks - 1)
            ]
            if stage == LOW_STAGE:
                self._low_layers, self.low_channels = len(layers), channels
        self.features = nn.Sequential(*layers)
        self.out_channels = channels
        self._initialise()

    def _initialise(self) -> None:
        # BatchNorm2d already starts at weight 1 and bias 0.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # Fan-out of each input. kaiming_normal_ counts all channels of a depthwise convolution, and
                # would shrink its maps.
                fan_out = module.out_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features of two stages.

        Args:
            x: images [B, 3, H, W].

        Returns:
            The features of the last block at stride 4 [B, low_channels, ceil(H/4), ceil(W/4)] and those of
            the last block [B, out_channels, ceil(H/output_stride), ceil(W/output_stride)].
        """
        low = self.features[: self._low_layers](x)
        return low, self.features[self._low_layers :](low)


def _conv_bn_relu6(convolution: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(convolution, BatchNorm2d(convolution.out_channels), nn.ReLU6(inplace=True))
