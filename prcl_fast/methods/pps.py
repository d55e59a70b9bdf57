"""PPS: prototypical contrast and cross supervision of two networks with several prototypes per class."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prcl_fast.config import Config
from prcl_fast.config.methods import PPSConfig
from prcl_fast.data.batches import Batch
from prcl_fast.data.source import IGNORE
from prcl_fast.errors import InputError
from prcl_fast.losses import (
    PixelCounts,
    odds_logits,
    one_prototype_per_class,
    prototypical_contrast,
    start_counting,
    supervised_loss,
)
from prcl_fast.losses.prototypical import Contrast
from prcl_fast.methods.base import StepIndex, check_draws_of_step
from prcl_fast.methods.cross_supervision import CrossSupervision
from prcl_fast.models.build import build_network
from prcl_fast.models.network import NetworkOutput, SegmentationNetwork, at_resolution
from prcl_fast.models.query_head import QueryHead
from prcl_fast.ops import pseudo_label, upsample_bilinear
from prcl_fast.step_parts import part


class PPS(CrossSupervision):
    """L = L_s + lambda_1 L_contra + lambda_2 L_sp + lambda_3 L_r, eq. (4), each over both networks.

    Source: Chen and Lian, "Semi-supervised Semantic Segmentation via Prototypical Contrastive Learning" (ACM
    MM 2022). Both networks have a head of prototypes (`models.query_head`) with the same queries and, by
    `shared`, the same transformer decoder, so that prototype (c, j) means the same in both. Cross
    supervision, eq. (6), supervises a pixel with its prototype's index instead of its class, and the pixels
    of both networks that have a prototype in common are each other's positives, eq. (7).

    The logits of a network are the sums S of eq. (8). f of eq. (9) keeps their order, so inference takes
    their argmax; labels supervise f(S), at the label's size. Scores are linear in the prototypes, so S is the
    pixel's dot product with the sum of a class's prototypes. One prototype can therefore have every pixel,
    with L_sp at 0, while another of its class compensates for it in S. L_r, which reads single prototypes,
    prevents this trivial solution (section 3.5); `prototypes_used` in the log shows it.
    """

    settings: PPSConfig
    unlabeled_terms: tuple[str, ...] = ("loss_cross", "loss_contrast", "loss_activation")
    representations = True
    run_seed: Tensor  # int64 scalar

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__(config, num_classes)
        check_draws_of_step(
            "classes * method.prototypes * method.anchors * method.negatives",
            num_classes * self.settings.prototypes * self.settings.anchors * self.settings.negatives,
        )
        first, second = self.student.classifier, self.second.classifier
        assert isinstance(first, QueryHead)
        assert isinstance(second, QueryHead)
        if self.settings.shared == "decoder":
            second.decoder = first.decoder
        else:
            second.decoder.queries = first.decoder.queries
        self.register_buffer("run_seed", torch.tensor(config.seed), persistent=False)
        self._contrast: Contrast | None = None

    def new_network(self, config: Config, num_classes: int) -> SegmentationNetwork:
        """With a head of prototypes."""
        prototypes = self.settings.prototypes
        if num_classes * prototypes > IGNORE:
            raise InputError(
                f"method.prototypes: at most {IGNORE} prototypes in all, got {prototypes} for each of "
                f"{num_classes} classes"
            )
        return build_network(config.model, num_classes, queries=self.settings)

    def losses(self, batch: Batch, step: StepIndex) -> dict[str, Tensor]:
        """The four terms of eq. (4) and their weighted sum."""
        unlabeled_images = batch.needed_unlabeled()
        image, targets = self.mixed(unlabeled_images)
        outputs, labeled, unlabeled = self.student_passes(batch, image)
        of_prototypes, of_classes = (None, None) if targets is None else targets
        if of_classes is None:
            of_classes = self._class_labels(outputs, unlabeled_images.inside)
        supervised = self.supervised(batch, self._labeled_logits(batch, outputs))
        cross = self.cross_supervision(batch, labeled, unlabeled, of_prototypes)
        with part("contrast"):
            self._contrast = self._prototypical_contrast(batch, outputs, of_classes[0] != IGNORE)
            contrast = self._contrast.loss
        activation = self._activation(batch, step, labeled, unlabeled, of_classes)
        settings = self.settings
        loss = supervised + settings.lambda_contrast * contrast
        loss = loss + settings.lambda_cross * cross + settings.lambda_activation * activation
        return {
            "loss": loss,
            "loss_supervised": supervised,
            "loss_cross": cross,
            "loss_contrast": contrast,
            "loss_activation": activation,
        }

    def scores(self, output: NetworkOutput) -> tuple[Tensor, ...]:
        """P_m, each prototype a category of its own, [B, C * n, h, w], and the classes' S, [B, C, h, w]."""
        assert output.prototype_scores is not None
        return output.prototype_scores, output.logits

    def labeled_loss(self, logits: Tensor, label: Tensor, counts: PixelCounts | None) -> Tensor:
        """L_s of one network, eq. (3), of f(S), eq. (9)."""
        if self.settings.assignment == "odds":
            # f is not linear, so S is upsampled first. For sums and softmax(S) the order does not matter.
            logits = odds_logits(upsample_bilinear(logits.float(), label.shape[-2:]))
        return supervised_loss(logits, label, counts=counts)

    def _labeled_logits(self, batch: Batch, outputs: list[NetworkOutput]) -> list[Tensor]:
        # Negative padding drops the unlabeled rows. Unlike a slice's, its gradient keeps the memory format.
        rest = len(batch.labeled_image) - len(outputs[0].logits)
        return [F.pad(output.logits, (0, 0, 0, 0, 0, 0, 0, rest)) for output in outputs]

    @torch.no_grad()
    def _class_labels(self, outputs: list[NetworkOutput], inside: Tensor) -> list[Tensor]:
        """Each network's class labels [Bu, H, W] of the unlabeled images, the last rows of its output."""
        logits = [output.logits[-len(inside) :] for output in outputs]
        labels = [pseudo_label(own, inside.shape[-2:])[0] for own in logits]
        return [label.masked_fill(~inside, IGNORE) for label in labels]

    def _prototypical_contrast(self, batch: Batch, outputs: list[NetworkOutput], inside: Tensor) -> Contrast:
        """Eq. (7) at the decoder's resolution, over all pixels of both networks: each has its own argmax."""
        scores, projections = [], []
        for output in outputs:
            assert output.prototype_scores is not None
            assert output.projection is not None
            scores.append(output.prototype_scores.detach())
            projections.append(output.projection)
        size = scores[0].shape[-2:]
        valid = torch.cat([at_resolution(batch.label != IGNORE, size), at_resolution(inside, size)])
        return prototypical_contrast(
            torch.cat(projections),
            torch.cat([own.argmax(dim=1) for own in scores]),
            valid.repeat(len(outputs), 1, 1),
            scores[0].shape[1],
            batch.seed,
            tau=self.settings.tau,
            num_anchors=self.settings.anchors,
            num_negatives=self.settings.negatives,
            normalize=self.settings.normalize,
        )

    def _activation(
        self,
        batch: Batch,
        step: StepIndex,
        labeled: list[Tensor],
        unlabeled: list[Tensor],
        targets: list[Tensor],
    ) -> Tensor:
        """L_r, eq. (10) and (11): labels, and on unlabeled images the other network's class labels."""
        counts = start_counting(batch.label)
        with part("losses"):
            # One draw for all micro-batches and ranks of a step.
            seed = torch.stack([self.run_seed, step.iteration])
            maps = one_prototype_per_class([*labeled, *unlabeled], self.num_classes, seed)
            terms = [supervised_loss(own, batch.label, counts=counts()) for own in maps[:2]]
            return torch.stack(terms).sum() + self.crossed(maps[2:], targets)

    def diagnostics(self) -> dict[str, Any]:
        """The contrast's loss at chance (all pixels alike), and the number of prototypes with pixels."""
        values = super().diagnostics()
        if self._contrast is not None:
            values["chance"] = math.log1p(self.settings.negatives)
            values["prototypes_used"] = int((self._contrast.pixels > 0).sum())
        return values
