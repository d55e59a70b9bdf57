"""The decoder of DeepLabv3+: atrous spatial pyramid pooling, joined with stride-4 features.

Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution" (2018), with plain convolutions. As
in the networks of the ReCo and PRCL papers, each head reads the joined features by a 3x3 convolution of its
own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prcl_fast.models.batch_norm import BatchNorm2d
from prcl_fast.models.conv3x3 import Conv3x3
from prcl_fast.models.sync_batch_norm import is_synchronized
from prcl_fast.ops import upsample_bilinear

RATES: dict[int, tuple[int, int, int]] = {16: (6, 12, 18), 8: (12, 24, 36)}


def conv_bn_relu(convolution: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(convolution, BatchNorm2d(convolution.out_channels), nn.ReLU(inplace=True))


class ImagePooling(nn.Module):
    """Global average, 1x1 convolution, BN, ReLU: [B, C, h, w] -> [B, width, 1, 1].

    A single image has no batch variance on a 1x1 map. For a training batch of one image, this BN therefore
    uses its running statistics and does not update them. Synchronised BN has the images of all processes and
    needs no such exception.
    """

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn = BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():  # a program for every size: a window would be of one size
            pooled = x.mean((2, 3), keepdim=True)
        else:
            # The gradient of a mean over the dimensions would have another memory format than x.
            pooled = F.avg_pool2d(x, x.shape[2:])
        x = self.conv(pooled)
        if x.shape[0] == 1 and not is_synchronized(self.bn):
            bn = self.bn
            x = F.batch_norm(
                x, bn.running_mean, bn.running_var, bn.weight, bn.bias, training=False, eps=bn.eps
            )
        else:
            x = self.bn(x)
        return F.relu(x, inplace=True)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: [B, C, h, w] -> [B, width, h, w].

    A 1x1 and three dilated 3x3 branches and the pooled image, projected together by a 1x1 convolution.
    """

    def __init__(self, in_channels: int, rates: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                conv_bn_relu(nn.Conv2d(in_channels, width, 1, bias=False)),
                *(conv_bn_relu(Conv3x3(in_channels, width, dilation=rate)) for rate in rates),
            ]
        )
        self.pooling = ImagePooling(in_channels, width)
        self.project = nn.Conv2d((len(rates) + 2) * width, width, 1, bias=False)
        self.bn = BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        local = torch.cat([branch(x) for branch in self.branches], dim=1)
        # The pooled image is constant over the map: projected before it is expanded, it gives the same sum.
        # An expanded operand (stride 0) would take the concatenation out of channels_last.
        width = self.bn.num_features
        local_weight, image_weight = self.project.weight.split([local.shape[1], width], dim=1)
        y = F.conv2d(local, local_weight) + F.conv2d(self.pooling(x), image_weight)
        return F.relu(self.bn(y), inplace=True)


class DeepLabDecoder(nn.Module):
    """ASPP, upsampled and joined with the projected low-level features.

    Args:
        low_channels, in_channels: channels of the backbone's two maps.
        output_stride: 8 or 16, of the backbone; the rates 6, 12, 18 are doubled at 8.
        width: channels of the ASPP; the low-level features get max(16, 48 * width // 256).

    Attributes:
        out_channels: channels of the joined features (304 at width 256).
        aspp_channels: the last of these, upsampled from the ASPP (256).
    """

    def __init__(self, low_channels: int, in_channels: int, output_stride: int, width: int = 256) -> None:
        super().__init__()
        low_width = max(16, 48 * width // 256)
        self.aspp = ASPP(in_channels, RATES[output_stride], width)
        self.low_level = conv_bn_relu(nn.Conv2d(low_channels, low_width, 1, bias=False))
        self.out_channels, self.aspp_channels = low_width + width, width

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """[B, low_channels, h, w], [B, in_channels, h', w'] -> [B, out_channels, h, w], low level first."""
        low = self.low_level(low)
        high = upsample_bilinear(self.aspp(high), low.shape[2:])
        return torch.cat([low, high], dim=1)
