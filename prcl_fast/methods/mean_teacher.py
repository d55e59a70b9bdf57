"""Mean Teacher: consistency with the teacher's pseudo-labels, with ClassMix, CutMix, CutOut or no mixing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prcl_fast.config import Config
from prcl_fast.config.methods import ConsistencyConfig
from prcl_fast.data.augment import strong_augment
from prcl_fast.data.batches import Batch
from prcl_fast.data.mix import mix
from prcl_fast.data.source import IGNORE
from prcl_fast.losses import PixelCounts, start_counting, supervised_loss, unsupervised_loss
from prcl_fast.methods.base import Method, StepIndex
from prcl_fast.models.network import NetworkOutput, joined
from prcl_fast.models.teacher import EMATeacher
from prcl_fast.ops import pseudo_label
from prcl_fast.step_parts import part


@dataclass(frozen=True)
class PseudoLabeled:
    """Unlabeled images as the student sees them, with pseudo-labels mixed in the same way."""

    image: Tensor  # [B, 3, h, w] strongly augmented and mixed, normalised
    label: Tensor  # [B, h, w] uint8, IGNORE outside the image and in erased boxes
    confidence: Tensor  # [B, h, w] float32, 0 where ignored
    counts: Callable[[], PixelCounts | None]  # waits for the all-reduce of the counts


class MeanTeacher(Method):
    """L = L_s + L_u, eq. (13) and (14); the teacher is the student's exponential moving average."""

    settings: ConsistencyConfig
    unlabeled_terms: tuple[str, ...] = ("loss_unsupervised",)

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.teacher = EMATeacher(self.student, decay=self.settings.ema)
        self._pseudo_labels: tuple[Tensor, Tensor] | None = None  # and confidences, of the last batch

    def losses(self, batch: Batch, step: StepIndex) -> dict[str, Tensor]:
        """The terms "loss_supervised" and "loss_unsupervised" and their sum."""
        unlabeled = self.pseudo_labeled(batch)
        output = self.student_pass(batch, unlabeled, representations=False)
        return self.segmentation_losses(batch, unlabeled, output.logits)

    def pseudo_labeled(self, batch: Batch) -> PseudoLabeled:
        """Eq. (1) on the weakly augmented images, then strong augmentation and mixing.

        Image, pseudo-label and confidence are mixed alike.
        """
        unlabeled = batch.needed_unlabeled()
        weak = unlabeled.image
        with torch.no_grad(), part("teacher"):
            label, confidence = pseudo_label(self.teacher_scores(self.normalize(weak)), weak.shape[-2:])
            label = label.masked_fill(~unlabeled.inside, IGNORE)
            confidence = confidence.masked_fill(~unlabeled.inside, 0.0)
        with torch.no_grad(), part("strong augmentation"):
            image = strong_augment(weak, unlabeled.strong)
            image, label, confidence = mix(image, label, confidence, unlabeled.strong, self.settings.mix)
            # The all-reduce overlaps with the student's pass.
            counts = start_counting(batch.label, label, confidence, self.settings.delta_u)
            return PseudoLabeled(self.normalize(image), label, confidence, counts)

    def teacher_scores(self, image: Tensor) -> Tensor:
        """Scores [B, C, h, w] of normalised images [B, 3, H, W], for their pseudo-labels."""
        return self.teacher(image, representations=False).logits

    def student_pass(self, batch: Batch, unlabeled: PseudoLabeled, *, representations: bool) -> NetworkOutput:
        """The student on the labeled and the unlabeled images: one output, the labeled rows first.

        `forward: separate` makes two passes, each with its own batch statistics. The losses read the whole
        output: slicing would zero-pad the gradient in another memory format.
        """
        with part("student"):
            images = [self.normalize(batch.labeled_image), unlabeled.image]
            if self.settings.forward == "concatenated":
                images = [torch.cat(images)]
            return joined([self.student(image, representations=representations) for image in images])

    def segmentation_losses(
        self, batch: Batch, unlabeled: PseudoLabeled, logits: Tensor
    ) -> dict[str, Tensor]:
        """L_s, L_u and their sum.

        Args:
            logits: [Bl + Bu, C, h, w], the labeled images first.
        """
        settings = self.settings
        self._pseudo_labels = unlabeled.label, unlabeled.confidence
        with part("losses"):
            counts = unlabeled.counts()
            labeled_logits, unlabeled_logits = logits.split([len(batch.label), len(unlabeled.label)])
            supervised = supervised_loss(labeled_logits, batch.label, counts=counts)
            unsupervised = unsupervised_loss(
                unlabeled_logits,
                unlabeled.label,
                unlabeled.confidence,
                delta_u=settings.delta_u,
                omega=settings.omega,
                counts=counts,
            )
            return {
                "loss": supervised + unsupervised,
                "loss_supervised": supervised,
                "loss_unsupervised": unsupervised,
            }

    def lay_out(self) -> None:
        """Moves the student into one flat tensor, and the teacher into another."""
        self.teacher.lay_out_flat()

    def after_step(self, step: StepIndex) -> None:
        """Moves the teacher towards the student."""
        with part("ema"):
            self.teacher.update(step.iteration)

    def networks(self) -> dict[str, nn.Module]:
        """Teacher and student; the teacher gives the run's mIoU."""
        return {"teacher": self.teacher.network, "student": self.student}

    def diagnostics(self) -> dict[str, Any]:
        """omega: the fraction of this rank's unlabeled pixels with a confidence above delta_u."""
        if self._pseudo_labels is None:
            return {}
        label, confidence = self._pseudo_labels
        return {"omega": float((confidence > self.settings.delta_u).sum() / (label != IGNORE).sum())}
