"""PCR: prototype-based consistency regularisation."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from prcl_fast.config import Config
from prcl_fast.config.methods import PCRConfig
from prcl_fast.data.batches import Batch
from prcl_fast.data.source import IGNORE
from prcl_fast.losses import FeatureBank, PrototypePredictor
from prcl_fast.methods.base import StepIndex
from prcl_fast.methods.mean_teacher import MeanTeacher
from prcl_fast.models.network import NetworkOutput, at_resolution
from prcl_fast.processes.collectives import rank, summed
from prcl_fast.step_parts import part

# Features of each class that K-means clusters, and the number of them that a warm-up step adds.
SAMPLES, _ADDED = 1024, 64


class PCR(MeanTeacher):
    """A linear and a prototype-based predictor that learn from the same labels and pseudo-labels.

    Source: Xu et al., "Semi-supervised Semantic Segmentation with Prototype-based Consistency Regularization"
    (NeurIPS 2022); equation and algorithm numbers are that paper's. The teacher's linear predictor labels the
    unlabeled images (its confident pixels only), which are then mixed. All pixels at the decoder's resolution
    take part; the authors' public code draws one of every patch.

    The first prototypes are the centres of K-means over features of labeled pixels, Algorithm 2. The features
    come from a network trained on the labeled images alone (`prototypes_from`) or, without one, from the
    student in the last of `warmup` supervised iterations. In both cases the student starts from
    `model.weights`: Algorithm 2 returns prototypes, not a network.

    With `predictor: prototype` there is no linear predictor after the warm-up (the second variant of table
    4): the prototypes, on the teacher's features, also give the pseudo-labels.
    """

    settings: PCRConfig

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__(config, num_classes)
        settings, decoder = self.settings, self.student.decoder
        dim = decoder.aspp_channels if settings.features == "aspp" else decoder.out_channels
        self.predictor = PrototypePredictor(
            num_classes,
            settings.prototypes,
            dim,
            temperature=settings.temperature,
            decay=settings.prototype_ema,
        )
        self.samples: FeatureBank | None = None
        if settings.prototypes_from is None:
            self.samples = FeatureBank(num_classes, dim, size=SAMPLES, rows=_ADDED)
        self._seed = config.seed
        self._alone = settings.predictor == "prototype"
        if not self._alone:
            own = ("loss_prototype_supervised", "loss_prototype_unsupervised")
            self.unlabeled_terms = (*self.unlabeled_terms, *own)
        elif not self.warmup:
            self.student.classifier.requires_grad_(False)  # no loss reads it

    def begin_step(self, iteration: int) -> bool:
        """Ends the warm-up with K-means over its features."""
        if iteration == self.warmup and self.samples is not None:
            self.make_prototypes(self.samples.features, self.samples.count.clamp(max=self.samples.size))
        return super().begin_step(iteration)

    def teacher_scores(self, image: Tensor) -> Tensor:
        """Eq. (7), the teacher's linear predictor; with `predictor: prototype`, eq. (2) on its features."""
        output = self.teacher(image, representations=False)
        return self.predictor(prototype_features(output, self.predictor)) if self._alone else output.logits

    def losses(self, batch: Batch, step: StepIndex) -> dict[str, Tensor]:
        """L_s and L_u of the linear predictor, and both again of the prototype predictor: eq. (4) and (8)."""
        unlabeled = self.pseudo_labeled(batch)
        output = self.student_pass(batch, unlabeled, representations=False)
        with part("contrast"):
            features = prototype_features(output, self.predictor)
            scores = self.predictor(features)
        prototype = self.segmentation_losses(batch, unlabeled, scores)
        with part("contrast"):
            label = at_resolution(torch.cat([batch.label, unlabeled.label]), scores.shape[-2:])
            certain = torch.full_like(batch.label, 2.0, dtype=torch.float32)  # above every threshold
            confidence = at_resolution(torch.cat([certain, unlabeled.confidence]), scores.shape[-2:])
            valid = (label != IGNORE) & (confidence >= self.settings.delta_u)
            self.predictor.update(features.detach(), label, valid)
        if self._alone:
            return prototype
        linear = self.segmentation_losses(batch, unlabeled, output.logits)
        return linear | {
            "loss": linear["loss"] + self.settings.lambda_prototype * prototype["loss"],
            "loss_prototype_supervised": prototype["loss_supervised"],
            "loss_prototype_unsupervised": prototype["loss_unsupervised"],
        }

    def supervised_losses(self, batch: Batch) -> dict[str, Tensor]:
        """L_s of the linear predictor; the features join the samples for K-means."""
        (output,), loss = self.supervised_pass(batch)
        if self.samples is not None:
            features = prototype_features(output, self.predictor).detach()
            label = at_resolution(batch.label, features.shape[-2:])
            self.samples.add(features, label, label != IGNORE, batch.seed)
        return self.supervised_terms(loss)

    def networks(self) -> dict[str, nn.Module]:
        """Teacher and student, and the prototype predictor on the teacher's features.

        With `predictor: prototype` it stands in for the linear predictor of both networks.
        """
        networks = super().networks()
        if self._alone:
            return {name: PrototypeNetwork(network, self.predictor) for name, network in networks.items()}
        return networks | {"teacher_prototypes": PrototypeNetwork(self.teacher.network, self.predictor)}

    @torch.no_grad()
    def make_prototypes(self, features: Tensor, count: Tensor) -> None:
        """Algorithm 2, step 3: K-means in every class, on rank 0. A collective: every rank must call it.

        Args:
            features: [C, M, D] of pixels of each class, the same on all ranks.
            count: [C] integer: the first `count` of a class's M rows are valid.
        """
        prototypes = torch.zeros_like(self.predictor.prototypes)
        if rank() == 0:
            rows = zip(features.cpu(), count.tolist(), strict=True)
            number = self.settings.prototypes
            centers = [cluster_centers(own[:kept], number, self._seed) for own, kept in rows]
            prototypes.copy_(torch.stack(centers))
        self.predictor.initialize(summed(prototypes), count > 0)


class PrototypeNetwork(nn.Module):
    """A network whose logits are those of the prototype predictor on its features, for evaluation.

    Args:
        network: as `SegmentationNetwork`.
        predictor: with prototypes in the space of its features.
    """

    def __init__(self, network: nn.Module, predictor: PrototypePredictor) -> None:
        super().__init__()
        self.network = network
        # In a tuple, so that it is no submodule: the prototypes are the state of the method.
        self._predictor = (predictor,)

    def forward(self, x: Tensor, *, representations: bool = False) -> NetworkOutput:
        """Eq. (2) of images [B, 3, H, W], logits float32; a network's representations are left out."""
        (predictor,) = self._predictor
        output = self.network(x, representations=False)
        return output._replace(logits=predictor(prototype_features(output, predictor)))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the network itself, not this wrapper."""
        self.network.compile(*args, **kwargs)


def prototype_features(output: NetworkOutput, predictor: PrototypePredictor) -> Tensor:
    """[B, D, h, w], the decoder's channels that prototypes are made of: all, or the last ones, ASPP's."""
    features, dim = output.features, predictor.prototypes.shape[-1]
    # The gradient of a slice of all channels would have another memory format than the features.
    return features if features.shape[1] == dim else features[:, -dim:]


def cluster_centers(features: Tensor, number: int, seed: int) -> Tensor:
    """K-means' centers [number, D] of features [M, D]; zeros where M is 0.

    Each is the mean of the features to which it is the nearest, Algorithm 2, step 3. Fewer than `number`
    distinct features give centers that repeat.
    """
    if not len(features):
        return features.new_zeros(number, features.shape[1])
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    clusters = min(number, len(features))
    # Several threads would add their sums in no fixed order.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct features than clusters
        found = KMeans(clusters, n_init=10, tol=0.0, random_state=seed % 2**32).fit(features.double().numpy())
    centers = torch.from_numpy(found.cluster_centers_).to(features.dtype)
    return centers[torch.arange(number) % clusters]
