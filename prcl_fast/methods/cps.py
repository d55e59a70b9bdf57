"""CPS: cross pseudo supervision of two networks."""

from __future__ import annotations

from torch import Tensor

from prcl_fast.config.methods import CPSConfig
from prcl_fast.data.batches import Batch
from prcl_fast.methods.base import StepIndex
from prcl_fast.methods.cross_supervision import CrossSupervision


class CPS(CrossSupervision):
    """L = L_s + lambda_cps L_cps, each summed over the two networks.

    Source: Chen et al., "Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision" (CVPR 2021).
    """

    settings: CPSConfig
    unlabeled_terms: tuple[str, ...] = ("loss_cross",)

    def losses(self, batch: Batch, step: StepIndex) -> dict[str, Tensor]:
        """L_s and the cross supervision of both networks."""
        image, targets = self.mixed(batch.needed_unlabeled())
        _, labeled, unlabeled = self.student_passes(batch, image)
        supervised = self.supervised(batch, labeled)
        cross = self.cross_supervision(batch, labeled, unlabeled, None if targets is None else targets[0])
        return {
            "loss": supervised + self.settings.lambda_cps * cross,
            "loss_supervised": supervised,
            "loss_cross": cross,
        }
