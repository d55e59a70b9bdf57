"""The three heads g, h and p on the decoder's features: class scores, mean and variance of each pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prcl_fast.models.batch_norm import BatchNorm2d
from prcl_fast.models.sync_batch_norm import is_synchronized, merged_moments
from prcl_fast.ops import Collectives, variance_head
from prcl_fast.processes.collectives import summed

_OVER_PROCESSES = Collectives(merged_moments, summed)


class _ConvHead(nn.Sequential):
    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, hidden_channels, 3, padding=1, bias=False),
            BatchNorm2d(hidden_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden_channels, out_channels, 1),
        )


class SegmentationHead(_ConvHead):
    """g: decoder features [B, C, h, w] -> logits [B, num_classes, h, w]."""


class RepresentationHead(_ConvHead):
    """h: decoder features [B, C, h, w] -> mean mu of each pixel's Gaussian [B, D, h, w], not normalised."""


class ProbabilityHead(nn.Module):
    """p: decoder features [B, C, h, w] -> variance sigma^2 of each pixel's Gaussian [B, D, h, w], float32.

    Linear-BN-ReLU-Linear-BN on every pixel. The rows of both weights are L2-normalised in each forward pass;
    the second BN has no affine part. A scalar gain gamma and bias beta follow, then

        sigma^2 = sigmoid(log(exp(x) + 1e-6)),

    which lies between 1e-6 and 1. The layers are those of both papers, [AAAI] and [IJCV], network structure.
    Normalised rows, BN without affine part, gain, bias and floored sigmoid are those of the authors' public
    code.

    Args:
        in_channels: C.
        dim: D.
        initial_variance: sigma^2 of the initial bias, around which the variances lie at the start; 0.5 is a
            bias of 0.
    """

    def __init__(self, in_channels: int, dim: int, initial_variance: float = 0.5) -> None:
        super().__init__()
        self.fc1 = nn.Parameter(torch.empty(dim, in_channels))
        self.bn1 = BatchNorm2d(dim)
        self.fc2 = nn.Parameter(torch.empty(dim, dim))
        self.bn2 = BatchNorm2d(dim, affine=False)
        self.gamma = nn.Parameter(torch.ones(1))
        self.beta = nn.Parameter(torch.logit(torch.tensor([initial_variance])))
        nn.init.kaiming_normal_(self.fc1)
        nn.init.kaiming_normal_(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(_normalized_linear(x, self.fc1)), inplace=True)
        # Under autocast the product is in low precision. Further rounding would show in the precisions
        # 1 / sigma^2, whose sums are the prototypes: the op computes in float32.
        x = _normalized_linear(x, self.fc2)
        norm = self.bn2  # for its statistics alone; the op normalises
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.momentum is not None
        if norm.training:
            norm.count_pass()
        return variance_head(
            x,
            self.gamma,
            self.beta,
            norm.running_mean,
            norm.running_var,
            training=norm.training,
            momentum=norm.momentum,
            eps=norm.eps,
            collectives=_OVER_PROCESSES if is_synchronized(norm) else None,
        )


def _normalized_linear(x: Tensor, weight: Tensor) -> Tensor:
    """[B, C, h, w] times weight [D, C] with rows of norm 1 -> [B, D, h, w]."""
    return F.conv2d(x, F.normalize(weight, dim=1)[:, :, None, None])
