"""PPS: cross supervision of two networks that see every class as several prototypes."""

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
from prcl_fast.methods.base import Step
from prcl_fast.methods.cps import CPS
from prcl_fast.models.network import NetworkOutput, SegmentationNetwork, at_resolution, build_network
from prcl_fast.models.query_head import QueryHead
from prcl_fast.ops import pseudo_label, upsample_bilinear
from prcl_fast.step_parts import part


class PPS(CPS):
    """L = L_s + lambda_1 L_contra + lambda_2 L_sp + lambda_3 L_r, eq. (4), each over both networks.

    Source: Chen and Lian, "Semi-supervised Semantic Segmentation via Prototypical Contrastive Learning" (ACM
    MM 2022). Both networks have a head of prototypes (`models.query_head`) with the same queries and, by
    `shared`, the same transformer decoder, so that prototype (c, j) of one stands for what (c, j) of the
    other does: cross supervision, eq. (6), tells a pixel its prototype instead of its class, and the pixels
    of both networks that have a prototype in common are one another's positives, eq. (7).

    The logits of a network are the sums S of eq. (8). f of eq. (9) keeps their order, so that inference is
    their argmax; labels supervise f(S), at the label's size. As scores are linear in the prototypes, S is the
    pixel's dot product with the sum of a class's prototypes: one prototype can have every pixel, and L_sp be
    0, while another of its class makes up for it in S. This is the trivial solution that L_r, which reads
    single prototypes, is there to prevent (section 3.5); `prototypes_used` in the log tells of it.
    """

    unlabeled_terms: tuple[str, ...] = ("loss_cross", "loss_contrast", "loss_activation")
    representations = True
    run_seed: Tensor  # int64 scalar

    def __init__(self, config: Config, num_classes: int) -> None:
        assert isinstance(config.method, PPSConfig)
        if num_classes * config.method.prototypes > IGNORE:
            raise InputError(
                f"method.prototypes: at most {IGNORE} prototypes in all, got {config.method.prototypes} for "
                f"each of {num_classes} classes"
            )
        super().__init__(config, num_classes)
        self.pps = config.method
        first, second = self.student.classifier, self.second.classifier
        assert isinstance(first, QueryHead)
        assert isinstance(second, QueryHead)
        if self.pps.shared == "decoder":
            second.decoder = first.decoder
        else:
            second.decoder.queries = first.decoder.queries
        self.register_buffer("run_seed", torch.tensor(config.seed), persistent=False)
        self._contrast: Contrast | None = None

    def new_network(self, config: Config, num_classes: int) -> SegmentationNetwork:
        """With a head of prototypes."""
        assert isinstance(config.method, PPSConfig)
        return build_network(config.model, num_classes, queries=config.method)

    def losses(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The four terms."""
        image, targets = self.mixed(batch)
        outputs, labeled, unlabeled = self.student_passes(batch, image)
        of_prototypes, of_classes = (None, None) if targets is None else targets
        if of_classes is None:
            of_classes = self._class_labels(batch, outputs)
        supervised = self.supervised(batch, self._labeled_logits(batch, outputs))
        cross = self.cross_supervision(batch, labeled, unlabeled, of_prototypes)
        with part("contrast"):
            self._contrast = self._prototypical_contrast(batch, outputs, of_classes[0] != IGNORE)
            contrast = self._contrast.loss
        activation = self._activation(batch, step, labeled, unlabeled, of_classes)
        pps = self.pps
        loss = supervised + pps.lambda_contrast * contrast
        loss = loss + pps.lambda_cross * cross + pps.lambda_activation * activation
        return {
            "loss": loss,
            "loss_supervised": supervised,
            "loss_cross": cross,
            "loss_contrast": contrast,
            "loss_activation": activation,
        }

    def scores(self, output: NetworkOutput) -> tuple[Tensor, ...]:
        """P_m, each prototype a category of its own, [B, C * n, h, w], and the classes' S, [B, C, h, w]."""
        assert output.prototypes is not None
        return output.prototypes.scores, output.logits

    def labeled_loss(self, logits: Tensor, label: Tensor, counts: PixelCounts | None) -> Tensor:
        """L_s of one network, eq. (3), of f(S), eq. (9)."""
        if self.pps.assignment == "odds":
            # f is not linear: S is upsampled first. (Sums and softmax(S) are the same either way.)
            logits = odds_logits(upsample_bilinear(logits.float(), label.shape[-2:]))
        return supervised_loss(logits, label, counts=counts)

    def _labeled_logits(self, batch: Batch, outputs: list[NetworkOutput]) -> list[Tensor]:
        # Padded by less than nothing: unlike that of a slice, the gradient is filled up in its memory format.
        rest = len(batch.labeled_image) - len(outputs[0].logits)
        return [F.pad(output.logits, (0, 0, 0, 0, 0, 0, 0, rest)) for output in outputs]

    @torch.no_grad()
    def _class_labels(self, batch: Batch, outputs: list[NetworkOutput]) -> list[Tensor]:
        """Each network's classes of the unlabeled images that it learns from as they are, [B, H, W]."""
        assert batch.inside is not None
        logits = [output.logits[len(batch.labeled_image) :] for output in outputs]
        labels = [pseudo_label(own, batch.inside.shape[-2:])[0] for own in logits]
        return [label.masked_fill(~batch.inside, IGNORE) for label in labels]

    def _prototypical_contrast(self, batch: Batch, outputs: list[NetworkOutput], inside: Tensor) -> Contrast:
        """Eq. (7) at the decoder's resolution, over all pixels of both networks: each has its own argmax."""
        scores, projections = [], []
        for output in outputs:
            assert output.prototypes is not None
            assert output.prototypes.projection is not None
            scores.append(output.prototypes.scores.detach())
            projections.append(output.prototypes.projection)
        size = scores[0].shape[-2:]
        valid = torch.cat([at_resolution(batch.label != IGNORE, size), at_resolution(inside, size)])
        return prototypical_contrast(
            torch.cat(projections),
            torch.cat([own.argmax(dim=1) for own in scores]),
            valid.repeat(len(outputs), 1, 1),
            scores[0].shape[1],
            batch.seed,
            tau=self.pps.tau,
            num_anchors=self.pps.anchors,
            num_negatives=self.pps.negatives,
            normalize=self.pps.normalize,
        )

    def _activation(
        self,
        batch: Batch,
        step: Step,
        labeled: list[Tensor],
        unlabeled: list[Tensor],
        targets: list[Tensor],
    ) -> Tensor:
        """L_r, eq. (10) and (11): labels, and the class labels of the other network on unlabeled images."""
        counts = start_counting(batch.label)
        with part("losses"):
            # One draw for all micro-batches and processes of a step.
            seed = torch.stack([self.run_seed, step.iteration])
            maps = one_prototype_per_class([*labeled, *unlabeled], self.num_classes, seed)
            terms = [supervised_loss(own, batch.label, counts=counts()) for own in maps[:2]]
            return torch.stack(terms).sum() + self.crossed(maps[2:], targets)

    def diagnostics(self) -> dict[str, Any]:
        """The contrast's loss where all pixels are alike, and how many prototypes have pixels."""
        values = super().diagnostics()
        if self._contrast is not None:
            values["chance"] = math.log1p(self.pps.negatives)
            values["prototypes_used"] = int((self._contrast.pixels > 0).sum())
        return values
