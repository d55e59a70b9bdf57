"""The package's network in plain PyTorch, for the alternatives to its training step."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prcl_fast.device import full_precision
from prcl_fast.models.batch_norm import BatchNorm2d
from prcl_fast.models.conv3x3 import Conv3x3
from prcl_fast.models.deeplab import DeepLabDecoder
from prcl_fast.models.heads import ProbabilityHead
from prcl_fast.models.network import NetworkOutput, SegmentationNetwork

LOG_FLOOR = math.log(1e-6)


def made_plain(network: SegmentationNetwork) -> SegmentationNetwork:
    """Replaces the package's ops in the network by PyTorch's; parameters and buffers stay."""
    plain = {
        BatchNorm2d: nn.BatchNorm2d,
        Conv3x3: nn.Conv2d,
        DeepLabDecoder: _Decoder,
        ProbabilityHead: _ProbabilityHead,
        SegmentationNetwork: _Network,
    }
    for module in network.modules():
        module.__class__ = plain.get(type(module), type(module))  # type: ignore[assignment]
    return network


def variance(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """sigmoid(log(exp(gamma x + beta) + 1e-6)) of normalised x [B, D, h, w]."""
    z = gamma * x + beta
    return torch.sigmoid(torch.logaddexp(z, torch.full_like(beta, LOG_FLOOR)))


class _Network(SegmentationNetwork):
    """Autocast casts each weight separately."""

    def forward(self, x: Tensor, *, representations: bool = True) -> NetworkOutput:
        return self._pass(x, representations)


class _Decoder(DeepLabDecoder):
    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        low = self.low_level(low)
        high = F.interpolate(self.aspp(high), low.shape[2:], mode="bilinear", align_corners=True)
        return torch.cat([low, high], dim=1)


class _ProbabilityHead(ProbabilityHead):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(_linear(x, self.fc1)), inplace=True)
        return variance(self.bn2(full_precision(_linear(x, self.fc2))), self.gamma, self.beta)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, F.normalize(weight, dim=1)[:, :, None, None])
