"""What sigma^2 is worth: how well it tells wrong pixels from right ones, and whether it was learned."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from prcl_fast.data.source import IGNORE
from prcl_fast.models.heads import ProbabilityHead
from prcl_fast.processes.collectives import summed

# A bin is the leading bits of a float32: 4096 bins for each power of two, from 2^-20 to 1. Values of one bin
# agree to 0.03%, and count as equal.
_DROPPED_BITS = 11
_FIRST = int(np.float32(2.0**-20).view(np.int32)) >> _DROPPED_BITS
BINS = (int(np.float32(1.0).view(np.int32)) >> _DROPPED_BITS) - _FIRST + 1

# Below this share sigma^2 counts as what it was: its start tells the pixels apart as well as it does itself.
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
    """How much of sigma^2 a probability head has learned since this was made.

    Mean and deviation of sigma^2 cannot tell: the batch norm of the head's last layer holds them where its
    gain and bias say, whatever the weights before it are. Nor can the length of their way: many small turns
    that agree change the mean over D far more than each dimension. So the starting head is kept, and both
    look at the same features.

    Args:
        head: at the start of the run, before its batch norms meet those of other processes.
    """

    def __init__(self, head: ProbabilityHead) -> None:
        self._head = head
        # Batch statistics for both: the running ones of the start belong to features that are gone.
        self._start, self._now = (copy.deepcopy(head).requires_grad_(False).train() for _ in range(2))
        self._sums: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block, what the head is given is looked at."""
        self._now.load_state_dict(self._head.state_dict())
        self._sums = torch.zeros(6, dtype=torch.float64, device=self._head.beta.device)
        hook = self._head.register_forward_hook(self._look)
        try:
            yield
        finally:
            hook.remove()

    def moved(self) -> float:
        """1 - r^2, r the correlation of sigma^2 (its mean over D) with that of the starting head.

        Over all pixels that the head was given in the last `watching`. The share of its variation that the
        start does not explain: 0 at the start, 1 for an unrelated head, nan where one of both is constant.
        Waits for the device; every process must call it.
        """
        assert self._sums is not None
        n, a, b, aa, bb, ab = summed(self._sums.clone()).tolist()
        if n == 0:
            return math.nan
        spread = (aa - a * a / n) * (bb - b * b / n)
        return 1 - (ab - a * b / n) ** 2 / spread if spread > 0 else math.nan

    @torch.no_grad()
    def _look(self, head: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        a, b = (one(inputs[0]).double().mean(dim=1).flatten() for one in (self._start, self._now))
        assert self._sums is not None
        sums = [a.sum(), b.sum(), a.dot(a), b.dot(b), a.dot(b)]
        self._sums += torch.stack([torch.full_like(sums[0], len(a)), *sums])


def explain_unlearned(moved: float, rate: float) -> str | None:
    """A sentence for a sigma^2 that is still the random one it was; None for one that has moved.

    Args:
        moved: see `HeadMovement`; below `MOVED` the head counts as still.
        rate: its learning rate.
    """
    if not moved < MOVED:
        return None
    return (
        f"sigma^2 is not learned: {100 * (1 - moved):.4g}% of its variation over pixels, more than "
        f"{100 * (1 - MOVED):.0f}%, is what the first, random weights of the probability head make of the "
        f"features, and so is its AUROC; raise optim.probability_lr, now {rate:.2g}"
    )
