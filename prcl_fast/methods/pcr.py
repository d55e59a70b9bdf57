"""PCR: prototype-based consistency regularisation."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from prcl_fast.config import Config
from prcl_fast.config_methods import PCRConfig
from prcl_fast.data.batches import Batch
from prcl_fast.data.source import IGNORE
from prcl_fast.distributed import rank, summed
from prcl_fast.losses import FeatureBank, PrototypePredictor, supervised_loss, unsupervised_loss
from prcl_fast.methods.base import Step
from prcl_fast.methods.mean_teacher import MeanTeacher
from prcl_fast.methods.resolution import at_resolution
from prcl_fast.parts import part

# Features of each class that K-means sees, and how many of them a step of the warm-up adds.
_SAMPLES, _ADDED = 1024, 64


class PCR(MeanTeacher):
    """A linear and a prototype-based predictor learn from the same labels and pseudo-labels.

    Source: Xu et al., "Semi-supervised Semantic Segmentation with Prototype-based Consistency Regularization"
    (NeurIPS 2022), equation and algorithm numbers are that paper's. Both predictors read the decoder's
    features; the teacher's linear predictor labels the unlabeled images (its confident pixels only), which
    then are mixed. The first `warmup` iterations are supervised; K-means over the features that labeled
    pixels had in the last of them makes the prototypes (Algorithm 2). All pixels at the decoder's resolution
    take part, where the authors' public code draws one of every patch.
    """

    unlabeled_terms: tuple[str, ...] = (
        *MeanTeacher.unlabeled_terms,
        "loss_prototype_supervised",
        "loss_prototype_unsupervised",
    )

    def __init__(self, config: Config, num_classes: int) -> None:
        assert isinstance(config.method, PCRConfig)
        super().__init__(config, num_classes)
        self.pcr = config.method
        dim = self.student.decoder.out_channels
        self.predictor = PrototypePredictor(
            num_classes,
            self.pcr.prototypes,
            dim,
            temperature=self.pcr.temperature,
            decay=self.pcr.prototype_ema,
        )
        self.samples = FeatureBank(num_classes, dim, size=_SAMPLES, rows=_ADDED)
        self._seed = config.seed

    def begin_step(self, iteration: int) -> bool:
        """Ends the warm-up with K-means."""
        if iteration == self.warmup:
            self._make_prototypes()
        return super().begin_step(iteration)

    def losses(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """L_s and L_u of the linear predictor, and both again of the prototype predictor."""
        unlabeled = self.pseudo_labeled(batch)
        output = self.student_pass(batch, unlabeled, representations=False)
        losses = self.segmentation_losses(batch, unlabeled, output.logits)
        with part("contrast"):
            features = output.features
            scores = self.predictor(features)
            counts = unlabeled.counts()
            labeled_scores, unlabeled_scores = scores.split([len(batch.label), len(unlabeled.label)])
            supervised = supervised_loss(labeled_scores, batch.label, counts=counts)
            unsupervised = unsupervised_loss(
                unlabeled_scores,
                unlabeled.label,
                unlabeled.confidence,
                delta_u=self.pcr.delta_u,
                omega=self.pcr.omega,
                counts=counts,
            )
            size = scores.shape[-2:]
            label = at_resolution(torch.cat([batch.label, unlabeled.label]), size)
            certain = torch.full_like(batch.label, 2.0, dtype=torch.float32)  # above every threshold
            confidence = at_resolution(torch.cat([certain, unlabeled.confidence]), size)
            valid = (label != IGNORE) & (confidence > self.pcr.delta_u)
            self.predictor.update(features.detach(), label, valid)
        losses["loss"] = losses["loss"] + self.pcr.lambda_prototype * (supervised + unsupervised)
        return losses | {
            "loss_prototype_supervised": supervised,
            "loss_prototype_unsupervised": unsupervised,
        }

    def supervised_losses(self, batch: Batch) -> dict[str, Tensor]:
        """L_s of the linear predictor; the features go to K-means' samples."""
        (output,), loss = self.supervised_pass(batch)
        label = at_resolution(batch.label, output.logits.shape[-2:])
        self.samples.add(output.features.detach(), label, label != IGNORE, batch.seed)
        return self.supervised_terms(loss)

    @torch.no_grad()
    def _make_prototypes(self) -> None:
        """K-means in every class, by process 0 for all."""
        prototypes = torch.zeros_like(self.predictor.prototypes)
        kept = self.samples.count.clamp(max=self.samples.size)
        if rank() == 0:
            rows = zip(self.samples.features.cpu(), kept.tolist(), strict=True)
            centers = [
                cluster_centers(features[:count], self.pcr.prototypes, self._seed) for features, count in rows
            ]
            prototypes.copy_(torch.stack(centers))
        self.predictor.initialize(summed(prototypes), kept > 0)


def cluster_centers(features: Tensor, number: int, seed: int) -> Tensor:
    """K-means' centers [number, D] of features [M, D]; zeros where M is 0.

    Fewer than `number` distinct features give centers that repeat.
    """
    if not len(features):
        return features.new_zeros(number, features.shape[1])
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    clusters = min(number, len(features))
    # One thread: several add their sums up in no fixed order.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct features than clusters
        found = KMeans(clusters, n_init=10, random_state=seed % 2**32).fit(features.double().numpy())
    centers = torch.from_numpy(found.cluster_centers_).to(features.dtype)
    return centers[torch.arange(number) % clusters]
