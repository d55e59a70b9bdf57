"""Training on the labeled images alone: the lower bound of every comparison."""

from __future__ import annotations

from torch import Tensor

from prcl_fast.data.batches import Batch
from prcl_fast.methods.base import Method, Step


class Supervised(Method):
    """L = L_s, eq. (13)."""

    def losses(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """One term, the cross-entropy of the labeled pixels."""
        _, loss = self.supervised_pass(batch)
        return {"loss": loss}
