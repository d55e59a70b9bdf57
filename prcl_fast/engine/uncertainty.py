"""What sigma^2 is worth: how well it tells wrong pixels from right ones, and whether it was learned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prcl_fast.data.source import IGNORE
from prcl_fast.models.heads import ProbabilityHead

# A bin is the leading bits of a float32: 4096 bins for each power of two, from 2^-20 to 1. Values of one bin
# agree to 0.03%, and count as equal.
_DROPPED_BITS = 11
_FIRST = int(np.float32(2.0**-20).view(np.int32)) >> _DROPPED_BITS
BINS = (int(np.float32(1.0).view(np.int32)) >> _DROPPED_BITS) - _FIRST + 1

# Rows turned by this much, about 3 degrees, give products that agree with the first ones to a correlation of
# 0.999.
MOVED = 0.05


def histogram_by_error(truth: Tensor, prediction: Tensor, values: Tensor) -> Tensor:
    """int64 [2, BINS]: values of the right pixels and of the wrong ones, pixels without label left out.

    Args:
        truth, prediction: uint8 [B, H, W].
        values: float32 [B, H, W] from 0 to 1; those below 2^-20 count as equal.
    """
    bins = ((values.contiguous().view(torch.int32) >> _DROPPED_BITS) - _FIRST).clamp_(0, BINS - 1)
    # Ignored pixels go to a bin of their own: a boolean index would cost a synchronisation more.
    cell = torch.where(truth == IGNORE, 2 * BINS, bins + BINS * (truth != prediction))
    return torch.bincount(cell.flatten(), minlength=2 * BINS + 1)[:-1].view(2, BINS)


@dataclass(frozen=True, eq=False)
class ErrorDetector:
    """The pixels of one network by a value that should be large where it is wrong."""

    histogram: np.ndarray  # int64 [2, BINS], row 0 right pixels, row 1 wrong ones

    @property
    def auroc(self) -> float:
        """The probability that a wrong pixel has a larger value than a right one, equal ones counted half.

        0.5 says nothing, 1 tells them apart; nan where all pixels are right, or all wrong.
        """
        right, wrong = self.histogram.astype(np.float64)
        pairs = right.sum() * wrong.sum()
        if pairs == 0:
            return float("nan")
        below = right.cumsum() - right / 2
        return float((wrong * below).sum() / pairs)

    @property
    def means(self) -> tuple[float, float]:
        """The mean value of the right pixels and of the wrong ones, to 0.03%; nan where there are none."""
        edges = (np.arange(BINS, dtype=np.int32) + _FIRST) << _DROPPED_BITS
        middle = (edges + (1 << (_DROPPED_BITS - 1))).view(np.float32).astype(np.float64)
        right, wrong = ((row * middle).sum() / row.sum() if row.any() else np.nan for row in self.histogram)
        return float(right), float(wrong)


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """What finds the wrong pixels of a network with a probability head."""

    variance: ErrorDetector  # sigma^2, its mean over the dimensions
    confidence: ErrorDetector  # 1 - the largest class probability, which every network has

    def summary(self) -> dict[str, float]:
        """The figures under the names that logs give them; empty where all pixels are right, or all wrong."""
        if math.isnan(self.variance.auroc):
            return {}
        right, wrong = self.variance.means
        return {
            "variance_auroc": self.variance.auroc,
            "confidence_auroc": self.confidence.auroc,
            "variance_right": right,
            "variance_wrong": wrong,
        }


class HeadMovement:
    """How far the layers of a probability head have moved since this was made.

    Mean and deviation of sigma^2 cannot tell: the batch norm of the head's last layer holds them where its
    gain and bias say, whatever the weights before it are. Which pixels get a large sigma^2 is up to those.

    Args:
        head: at the start of the run.
    """

    def __init__(self, head: ProbabilityHead) -> None:
        self._head = head
        self._start = _layers(head)

    def moved(self) -> float:
        """|theta - theta_0| / |theta_0|, the rows of both weights normalised as in the forward pass.

        theta is what stands before the last batch norm. 0 at the start; for unrelated weights about 1.2.
        Waits for the device.
        """
        difference = torch.linalg.vector_norm(_layers(self._head) - self._start)
        return float(difference / torch.linalg.vector_norm(self._start))


def explain_unlearned(moved: float, rate: float) -> str | None:
    """A sentence for a head that is still the random one it was; None for one that has moved.

    Args:
        moved: see `HeadMovement`; below `MOVED` the head counts as still.
        rate: its learning rate.
    """
    if moved >= MOVED:
        return None
    return (
        f"sigma^2 is not learned: the probability head has moved by {100 * moved:.2g}% of its size since the "
        f"start, less than {100 * MOVED:.0f}%, so sigma^2 and its AUROC are what random weights make of the "
        f"features; raise optim.probability_lr, now {rate:.2g}"
    )


@torch.no_grad()
def _layers(head: ProbabilityHead) -> Tensor:
    """The weights without the lengths that the forward pass takes out, and the inner batch norm: [N]."""
    rows = [F.normalize(weight.double(), dim=1).flatten() for weight in (head.fc1, head.fc2)]
    return torch.cat([*rows, head.bn1.weight.double(), head.bn1.bias.double()])
