"""Quality of sigma^2: its AUROC as a detector of wrong pixels, and whether it was learned."""

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

# 1 - r^2 below which sigma^2 counts as unlearned: the initial head orders the pixels as well as it does.
MOVED = 0.05


def histogram_by_error(truth: Tensor, prediction: Tensor, values: Tensor) -> Tensor:
    """int64 [2, BINS]: values of the right pixels and of the wrong ones, without the ignored pixels.

    Args:
        truth, prediction: uint8 [B, H, W].
        values: float32 [B, H, W] from 0 to 1; those below 2^-20 count as equal.
    """
    bins = ((values.contiguous().view(torch.int32) >> _DROPPED_BITS) - _FIRST).clamp_(0, BINS - 1)
    # Ignored pixels get a bin of their own: a boolean index would cost one more synchronisation.
    cell = torch.where(truth == IGNORE, 2 * BINS, bins + BINS * (truth != prediction))
    return torch.bincount(cell.flatten(), minlength=2 * BINS + 1)[:-1].view(2, BINS)


@dataclass(frozen=True, eq=False)
class ErrorDetector:
    """Histogram of a value that should be large where a network is wrong."""

    histogram: np.ndarray  # int64 [2, BINS], row 0 right pixels, row 1 wrong ones

    @property
    def auroc(self) -> float:
        """The probability that a wrong pixel has a larger value than a right one; ties count half.

        0.5 is chance, 1 a perfect detector; nan where all pixels are right, or all wrong.
        """
        right, wrong = self.histogram.astype(np.float64)
        pairs = right.sum() * wrong.sum()
        if pairs == 0:
            return float("nan")
        below = right.cumsum() - right / 2
        return float((wrong * below).sum() / pairs)

    @property
    def means(self) -> tuple[float, float]:
        """The mean value of the right and of the wrong pixels, to 0.03%; nan where there are none."""
        edges = (np.arange(BINS, dtype=np.int32) + _FIRST) << _DROPPED_BITS
        middle = (edges + (1 << (_DROPPED_BITS - 1))).view(np.float32).astype(np.float64)
        right, wrong = ((row * middle).sum() / row.sum() if row.any() else np.nan for row in self.histogram)
        return float(right), float(wrong)


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """Two detectors of the wrong pixels of a network with a probability head."""

    variance: ErrorDetector  # sigma^2, its mean over the dimensions
    confidence: ErrorDetector  # 1 - the largest class probability, which every network has

    def summary(self) -> dict[str, float]:
        """The figures under their names in the log; empty where all pixels are right, or all wrong."""
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
    """Change of a probability head's sigma^2 since this object was made.

    Mean and deviation of sigma^2 do not show it: the gain and bias of the head's last batch norm fix them,
    whatever the weights before it are. Nor does the distance of the weights: many small changes that agree
    move the mean over D far more than each dimension. So a copy of the initial head is kept, and both heads
    see the same features.

    Args:
        head: at the start of the run, before its batch norms are synchronised.
    """

    def __init__(self, head: ProbabilityHead) -> None:
        self._head = head
        # Both use batch statistics: the running ones of the start belong to features that no longer exist.
        self._start, self._now = (copy.deepcopy(head).requires_grad_(False).train() for _ in range(2))
        self._sums: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Compares both heads on every input of the head within the block."""
        self._now.load_state_dict(self._head.state_dict())
        self._sums = torch.zeros(6, dtype=torch.float64, device=self._head.beta.device)
        hook = self._head.register_forward_hook(self._look)
        try:
            yield
        finally:
            hook.remove()

    def moved(self) -> float:
        """1 - r^2, where r correlates sigma^2 (its mean over D) with that of the initial head.

        This is the fraction of its variation that the initial head does not explain, over all pixels of the
        last `watching`: 0 at the start, 1 for an unrelated head, nan where either is constant. Reads from the
        device. A collective: every rank must call it.
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
    """A note where sigma^2 is still that of the random initial head; None where it was learned.

    Args:
        moved: of `HeadMovement.moved`; below `MOVED`, sigma^2 counts as unlearned.
        rate: learning rate of the head.
    """
    if not moved < MOVED:
        return None
    return (
        f"sigma^2 is not learned: {100 * (1 - moved):.4g}% of its variation over pixels, more than "
        f"{100 * (1 - MOVED):.0f}%, comes from the random initial weights of the probability head, and so "
        f"does its AUROC; raise optim.probability_lr, now {rate:.2g}"
    )
