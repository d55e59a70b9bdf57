"""Training on the labeled images alone: the lower bound of every comparison."""

from __future__ import annotations

from torch import Tensor

from prcl_fast.data.batches import Batch
from prcl_fast.losses import start_counting, supervised_loss
from prcl_fast.methods.base import Method, Step
from prcl_fast.parts import part


class Supervised(Method):
    """L = L_s, eq. (13)."""

    def losses(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """One term, the cross-entropy of the labeled pixels."""
        counts = start_counting(batch.label)
        with part("student"):
            logits = self.student(self.normalize(batch.labeled_image), representations=False).logits
        with part("losses"):
            return {"loss": supervised_loss(logits, batch.label, counts=counts())}
