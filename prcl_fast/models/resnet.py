"""ResNet backbones for dense prediction: torchvision's parameter names, no classifier, dilated stages.

Source: He et al., "Deep Residual Learning for Image Recognition" (2016). As in torchvision, the 3x3
convolution of a bottleneck has its stride. The deep stem is the one of He et al., "Bag of Tricks" (2019).
"""

from __future__ import annotations

from torch import Tensor, nn

from prcl_fast.errors import InputError
from prcl_fast.models.batch_norm import BatchNorm2d
from prcl_fast.models.conv3x3 import Conv3x3


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """The projection of a shortcut whose shape changes; None for an identity."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), BatchNorm2d(out_channels)
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions. `first_dilation` applies to the first, which has the stride."""

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
    """1x1, 3x3, 1x1 convolutions. `first_dilation` applies to the 3x3 one, which has the stride."""

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

    A stage without its stride dilates all later convolutions instead. The features at every second pixel are
    then exactly those of the strided network, so that ImageNet weights stay valid. Unlike torchvision's,
    basic blocks can be dilated, too.

    Args:
        depth: 18, 34, 50 or 101.
        stem: "plain" (7x7 convolution) or "deep" (three 3x3 convolutions, 128 channels).
        output_stride: 8 or 16.
        base_width: channels of the first stage, 64 in the published networks; all others are in proportion.

    Attributes:
        low_channels, out_channels: channels of the two maps that `forward` returns.
        classifier_keys: prefixes of the classifier's keys in torchvision's files.

    Raises:
        InputError: an argument has none of these values.
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
