"""Cross supervision: two networks, each of which learns from the other's pseudo-labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prcl_fast.config import Config
from prcl_fast.config.methods import CrossSupervisionConfig
from prcl_fast.data.batches import Batch, UnlabeledBatch
from prcl_fast.data.mix import mix
from prcl_fast.data.source import IGNORE
from prcl_fast.losses import start_counting, supervised_loss
from prcl_fast.methods.base import Method
from prcl_fast.models.network import NetworkOutput, SegmentationNetwork
from prcl_fast.ops import pseudo_label
from prcl_fast.step_parts import part


class CrossSupervision(Method):
    """Base of CPS and PPS: a second network, its passes, and the loss of cross supervision.

    With `mix: cutmix`, the networks label the weakly augmented unlabeled images, in training mode, and learn
    from each other's labels on the mixed images. With `mix: none`, they learn from each other's labels of the
    same pass, of the labeled images as well. Every pseudo-label counts, however uncertain.
    """

    settings: CrossSupervisionConfig
    representations = False  # whether the pass that learns embeds the pixels, too

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.second = self.new_network(config, num_classes)

    def learners(self) -> list[SegmentationNetwork]:
        """Both networks."""
        return [self.student, self.second]

    def networks(self) -> dict[str, nn.Module]:
        """Both networks; the first gives the run's mIoU."""
        return {"student": self.student, "second": self.second}

    def scores(self, output: NetworkOutput) -> tuple[Tensor, ...]:
        """Maps [B, categories, h, w] that pseudo-labels are read from; cross supervision trains the first."""
        return (output.logits,)

    def mixed(self, unlabeled: UnlabeledBatch) -> tuple[Tensor, list[list[Tensor]] | None]:
        """The unlabeled images that the networks learn from, and both networks' labels of them.

        With `mix: none` there are no labels yet: they come from the pass that learns.

        Returns:
            The images [B, 3, H, W], and for each of `scores` both networks' labels [B, H, W].
        """
        weak = image = unlabeled.image
        if self.settings.mix == "none":
            return weak, None
        targets = []
        with torch.no_grad():
            for network in self.learners():
                with part("teacher"):
                    output = network(self.normalize(weak), representations=False)
                    found = [pseudo_label(scores, weak.shape[-2:]) for scores in self.scores(output)]
                own = []
                for label, confidence in found:
                    with part("strong augmentation"):
                        label = label.masked_fill(~unlabeled.inside, IGNORE)
                        # The boxes depend on the draws alone: the mixed image is the same each time.
                        image, label, _ = mix(weak, label, confidence, unlabeled.strong, "cutmix")
                    own.append(label)
                targets.append(own)
        return image, [list(labels) for labels in zip(*targets, strict=True)]

    def student_passes(
        self, batch: Batch, unlabeled_image: Tensor
    ) -> tuple[list[NetworkOutput], list[Tensor], list[Tensor]]:
        """Both networks on labeled and unlabeled images together.

        Returns:
            Each network's output, and the first of its `scores` of the labeled and of the unlabeled images.
            The losses read these two parts. A slice of the whole would fill its gradient up with zeros in
            another memory format.
        """
        image = self.normalize(torch.cat([batch.labeled_image, unlabeled_image]))
        with part("student"):
            outputs = [network(image, representations=self.representations) for network in self.learners()]
            sizes = [len(batch.labeled_image), len(unlabeled_image)]
            parts = [self.scores(output)[0].split(sizes) for output in outputs]
        return outputs, [labeled for labeled, _ in parts], [unlabeled for _, unlabeled in parts]

    def supervised(self, batch: Batch, logits: list[Tensor]) -> Tensor:
        """L_s, summed over the networks, from their logits of the labeled images."""
        counts = start_counting(batch.label)
        with part("losses"):
            terms = [self.labeled_loss(own, batch.label, counts()) for own in logits]
            return torch.stack(terms).sum()

    def cross_supervision(
        self, batch: Batch, labeled: list[Tensor], unlabeled: list[Tensor], targets: list[Tensor] | None
    ) -> Tensor:
        """Each network's cross-entropy with the other's labels, summed over both.

        Args:
            labeled, unlabeled: both networks' scores.
            targets: their labels of the mixed images; None where the labels come from the scores themselves,
                of the labeled images as well.
        """
        with part("losses"):
            if targets is not None:
                return self.crossed(unlabeled, targets)
            terms = []
            # The border outside a labeled image is ignored, too.
            inside = batch.needed_unlabeled().inside
            for scores, known in ((labeled, batch.label != IGNORE), (unlabeled, inside)):
                with torch.no_grad():
                    labels = [pseudo_label(score, known.shape[-2:])[0] for score in scores]
                    labels = [label.masked_fill(~known, IGNORE) for label in labels]
                terms.append(self.crossed(scores, labels))
            return terms[0] + terms[1]

    def crossed(self, scores: list[Tensor], targets: list[Tensor]) -> Tensor:
        """The cross-entropy of each network's scores with the other's labels, summed over both.

        Both networks' labels are ignored at the same pixels.
        """
        counts = start_counting(targets[0])
        return supervised_loss(scores[0], targets[1], counts=counts()) + supervised_loss(
            scores[1], targets[0], counts=counts()
        )
