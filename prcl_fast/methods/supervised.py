"""Supervised training on the labeled images alone: the lower bound of every comparison."""

from __future__ import annotations

from torch import Tensor

from prcl_fast.data.batches import Batch
from prcl_fast.methods.base import Method, StepIndex


class Supervised(Method):
    """L = L_s, eq. (13)."""

    def losses(self, batch: Batch, step: StepIndex) -> dict[str, Tensor]:
        """The cross-entropy of the labeled pixels, the only term."""
        _, loss = self.supervised_pass(batch)
        return {"loss": loss}
