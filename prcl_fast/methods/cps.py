"""CPS: two networks, each of which learns from the other's pseudo-labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prcl_fast.config import Config
from prcl_fast.config.methods import CPSConfig, PPSConfig
from prcl_fast.data.batches import Batch
from prcl_fast.data.mix import mix
from prcl_fast.data.source import IGNORE
from prcl_fast.losses import start_counting, supervised_loss
from prcl_fast.methods.base import Method, Step
from prcl_fast.models.network import NetworkOutput, SegmentationNetwork
from prcl_fast.ops import pseudo_label
from prcl_fast.step_parts import part


class CPS(Method):
    """L = L_s + lambda_cps L_cps, each summed over the two networks.

    Source: Chen et al., "Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision" (CVPR 2021).
    With `mix: cutmix` the networks label the unlabeled images as they are, in training mode, and learn from
    one another's labels on the mixed images; with `mix: none` they learn from what they say of the same
    images, the labeled ones included. Every pseudo-label counts, however uncertain.
    """

    needs_unlabeled = True
    unlabeled_terms: tuple[str, ...] = ("loss_cross",)
    representations = False  # whether the pass that learns embeds the pixels, too

    def __init__(self, config: Config, num_classes: int) -> None:
        assert isinstance(config.method, (CPSConfig, PPSConfig))
        super().__init__(config, num_classes)
        self.mix = config.method.mix
        self.second = self.new_network(config, num_classes)
        self.lambda_cross = (
            config.method.lambda_cps if isinstance(config.method, CPSConfig) else config.method.lambda_cross
        )

    def learners(self) -> list[SegmentationNetwork]:
        """Both networks."""
        return [self.student, self.second]

    def networks(self) -> dict[str, nn.Module]:
        """The first one counts."""
        return {"student": self.student, "second": self.second}

    def losses(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """L_s and the cross supervision of both networks."""
        image, targets = self.mixed(batch)
        _, labeled, unlabeled = self.student_passes(batch, image)
        supervised = self.supervised(batch, labeled)
        cross = self.cross_supervision(batch, labeled, unlabeled, None if targets is None else targets[0])
        return {
            "loss": supervised + self.lambda_cross * cross,
            "loss_supervised": supervised,
            "loss_cross": cross,
        }

    def scores(self, output: NetworkOutput) -> tuple[Tensor, ...]:
        """Maps [B, categories, h, w] that pseudo-labels are read from; those of the first learn by L_cps."""
        return (output.logits,)

    def mixed(self, batch: Batch) -> tuple[Tensor, list[list[Tensor]] | None]:
        """The unlabeled images as the networks learn from them, and their labels.

        With `mix: none` there are no labels yet: they come from the pass that learns.

        Returns:
            The images, and for each of `scores` both networks' labels [B, H, W] of them.
        """
        assert batch.unlabeled_image is not None
        assert batch.inside is not None
        assert batch.strong is not None
        weak = batch.unlabeled_image
        if self.mix == "none":
            return weak, None
        targets = []
        image = weak
        with torch.no_grad():
            for network in self.learners():
                with part("teacher"):
                    output = network(self.normalize(weak), representations=False)
                    found = [pseudo_label(scores, weak.shape[-2:]) for scores in self.scores(output)]
                own = []
                for label, confidence in found:
                    with part("strong augmentation"):
                        label = label.masked_fill(~batch.inside, IGNORE)
                        # The boxes depend on the draws alone: all get the same image.
                        image, label, _ = mix(weak, label, confidence, batch.strong, "cutmix")
                    own.append(label)
                targets.append(own)
        return image, [list(labels) for labels in zip(*targets, strict=True)]

    def student_passes(
        self, batch: Batch, unlabeled_image: Tensor
    ) -> tuple[list[NetworkOutput], list[Tensor], list[Tensor]]:
        """Both networks on labeled and unlabeled images together.

        Returns:
            Each network's output, and the first of its `scores` of the labeled and of the unlabeled images.
            The losses read the two parts and never some rows of the whole, whose gradient would be filled up
            with zeros in another memory format.
        """
        image = self.normalize(torch.cat([batch.labeled_image, unlabeled_image]))
        with part("student"):
            outputs = [network(image, representations=self.representations) for network in self.learners()]
            sizes = [len(batch.labeled_image), len(unlabeled_image)]
            parts = [self.scores(output)[0].split(sizes) for output in outputs]
        return outputs, [labeled for labeled, _ in parts], [unlabeled for _, unlabeled in parts]

    def supervised(self, batch: Batch, logits: list[Tensor]) -> Tensor:
        """L_s, summed over the networks, of their logits of the labeled images."""
        counts = start_counting(batch.label)
        with part("losses"):
            terms = [self.labeled_loss(own, batch.label, counts()) for own in logits]
            return torch.stack(terms).sum()

    def cross_supervision(
        self, batch: Batch, labeled: list[Tensor], unlabeled: list[Tensor], targets: list[Tensor] | None
    ) -> Tensor:
        """L_cps: each network's cross-entropy with the other's labels, summed over both.

        Args:
            labeled, unlabeled: both networks' scores.
            targets: their labels of the mixed images; None where they come from the scores themselves, of
                the labeled images as well.
        """
        with part("losses"):
            if targets is not None:
                return self.crossed(unlabeled, targets)
            assert batch.inside is not None
            terms = []
            # A labeled image's border is ignored, too.
            for scores, inside in ((labeled, batch.label != IGNORE), (unlabeled, batch.inside)):
                with torch.no_grad():
                    labels = [pseudo_label(score, inside.shape[-2:])[0] for score in scores]
                    labels = [label.masked_fill(~inside, IGNORE) for label in labels]
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
