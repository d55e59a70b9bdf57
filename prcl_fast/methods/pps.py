"""PPS: cross supervision of two networks that see every class as several prototypes."""

from __future__ import annotations

from torch import Tensor

from prcl_fast.config import Config
from prcl_fast.config_methods import PPSConfig
from prcl_fast.data.batches import Batch
from prcl_fast.data.source import IGNORE
from prcl_fast.errors import InputError
from prcl_fast.losses import activation_regularization, prototypical_contrast
from prcl_fast.methods.base import Step
from prcl_fast.methods.cps import CPS
from prcl_fast.methods.resolution import at_resolution
from prcl_fast.models.network import NetworkOutput, SegmentationNetwork, build_network
from prcl_fast.models.query_head import of_nearest
from prcl_fast.parts import part


class PPS(CPS):
    """L = L_s + lambda_cross L_cross + lambda_contrast L_contrast + lambda_activation L_activation.

    Source: Chen and Lian, "Semi-supervised Semantic Segmentation via Prototypical Contrastive Learning" (ACM
    MM 2022); see `losses.prototypical` for what is known of it. Both networks have a head of prototypes
    (`models.query_head`) with the same queries, so that prototype (c, j) of one stands for what (c, j) of the
    other does, and cross supervision, eq. (6), can tell a pixel its prototype instead of its class. Each
    pixel's class is that of its nearest prototype, eq. (8) and (9).
    """

    unlabeled_terms: tuple[str, ...] = ("loss_cross", "loss_contrast", "loss_activation")

    def __init__(self, config: Config, num_classes: int) -> None:
        assert isinstance(config.method, PPSConfig)
        if num_classes * config.method.prototypes > IGNORE:
            raise InputError(
                f"method.prototypes: at most {IGNORE} prototypes in all, got {config.method.prototypes} for "
                f"each of {num_classes} classes"
            )
        super().__init__(config, num_classes)
        self.pps = config.method
        self.second.classifier.queries = self.student.classifier.queries

    def new_network(self, config: Config, num_classes: int) -> SegmentationNetwork:
        """With a head of prototypes."""
        assert isinstance(config.method, PPSConfig)
        return build_network(config.model, num_classes, queries=config.method)

    def losses(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The terms of both networks."""
        image, targets = self.mixed(batch)
        outputs, labeled, unlabeled = self.student_passes(batch, image)
        supervised = self.supervised(batch, labeled)
        cross = self.cross_supervision(batch, labeled, unlabeled, targets)
        with part("contrast"):
            found = [output.prototypes for output in outputs]
            assert found[0] is not None
            assert found[1] is not None
            first, second = found[0].prototypes, found[1].prototypes
            tau = self.pps.tau
            contrast = prototypical_contrast(first, second, tau) + prototypical_contrast(second, first, tau)
            label = at_resolution(batch.label, labeled[0].shape[-2:])
            activation = activation_regularization(labeled[0], label, self.num_classes)
            activation = activation + activation_regularization(labeled[1], label, self.num_classes)
        pps = self.pps
        loss = supervised + pps.lambda_cross * cross
        loss = loss + pps.lambda_contrast * contrast + pps.lambda_activation * activation
        return {
            "loss": loss,
            "loss_supervised": supervised,
            "loss_cross": cross,
            "loss_contrast": contrast,
            "loss_activation": activation,
        }

    def scores(self, output: NetworkOutput) -> Tensor:
        """Every prototype is a category of its own: [B, C * n, h, w]."""
        assert output.prototypes is not None
        return output.prototypes.scores

    def logits(self, scores: Tensor) -> Tensor:
        """Each class's score is that of its nearest prototype."""
        return of_nearest(scores, self.num_classes)
