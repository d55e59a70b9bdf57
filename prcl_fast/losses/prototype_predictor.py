"""The prototype-based predictor of PCR: K prototypes per class; the nearest gives the class score."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prcl_fast.ops import prototype_statistics
from prcl_fast.ops.arguments import (
    BOOL,
    FLOATING,
    INTEGER,
    check_count,
    check_number,
    check_temperature,
    check_tensor,
)
from prcl_fast.processes.collectives import summed


class PrototypePredictor(nn.Module):
    """K prototypes p_ck of every class, their class scores, and their moving average.

    Source: Xu et al., "Semi-supervised Semantic Segmentation with Prototype-based Consistency Regularization"
    (NeurIPS 2022); equation numbers are that paper's. The prototypes carry no gradient. With several
    processes they are those of all pixels.

    Args:
        num_classes: C.
        num_prototypes: K, per class.
        dim: D, channels of the features.
        temperature: T, eq. (2).
        decay: alpha, eq. (11).
    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. So do the methods.
    """

    prototypes: Tensor  # [C, K, D] float32
    known: Tensor  # [C] bool, classes that have prototypes

    def __init__(
        self, num_classes: int, num_prototypes: int, dim: int, *, temperature: float, decay: float
    ) -> None:
        super().__init__()
        check_count("num_classes", num_classes)
        check_count("num_prototypes", num_prototypes)
        check_count("dim", dim)
        check_temperature("temperature", temperature)
        check_number("decay", decay, 0.0, 1.0)
        self.temperature, self.decay = temperature, decay
        self.register_buffer("prototypes", torch.zeros(num_classes, num_prototypes, dim))
        self.register_buffer("known", torch.zeros(num_classes, dtype=torch.bool))

    def forward(self, features: Tensor) -> Tensor:
        """Eq. (2): features [B, D, h, w] -> class scores [B, C, h, w], max over k of cos(f, p_ck) / T.

        A class without prototypes gets the lowest possible score, -1 / T.
        """
        self._check(features)
        similarity = self._similarity(features).amax(dim=-1)
        return (torch.where(self.known, similarity, -1.0) / self.temperature).permute(0, 3, 1, 2)

    def _check(self, features: Tensor) -> None:
        beside = ("the prototypes", self.prototypes)
        check_tensor("features", features, ("B", self.prototypes.shape[2], "h", "w"), FLOATING, beside)

    def _similarity(self, features: Tensor) -> Tensor:
        """Cosine with every prototype, [B, h, w, C, K]; this order keeps gradients channels_last."""
        weight = F.normalize(self.prototypes, dim=-1).flatten(0, 1)[:, :, None, None]
        similarity = F.conv2d(F.normalize(features, dim=1), weight.to(features.dtype))
        return similarity.float().permute(0, 2, 3, 1).unflatten(-1, self.prototypes.shape[:2])

    @torch.no_grad()
    def initialize(self, prototypes: Tensor, known: Tensor) -> None:
        """Sets the prototypes [C, K, D] and the classes [C] that have them."""
        check_tensor("prototypes", prototypes, self.prototypes.shape, FLOATING)
        check_tensor("known", known, self.known.shape, BOOL)
        self.prototypes.copy_(prototypes)
        self.known.copy_(known)

    @torch.no_grad()
    def update(self, features: Tensor, label: Tensor, valid: Tensor) -> None:
        """Eq. (11): p_ck moves to alpha p_ck + (1 - alpha) times the mean of the features nearest to it.

        Each valid pixel belongs to the nearest prototype of its class. A prototype without pixels does not
        move, and a class without prototypes gets none. Eq. (11) is written for one pixel, F[a, b]. An update
        for each of a batch's n pixels would leave a weight of alpha^n, close to 0, on the former prototype;
        a step therefore updates each prototype once.

        Args:
            features: [B, D, h, w].
            label: [B, h, w] integer; values outside 0 .. C-1 are no class.
            valid: [B, h, w] bool.
        """
        self._check(features)
        beside = ("features", features)
        check_tensor("label", label, (len(features), *features.shape[2:]), INTEGER, beside)
        check_tensor("valid", valid, label.shape, BOOL, beside)
        num_classes, per_class, dim = self.prototypes.shape
        own = label.long().clamp(0, num_classes - 1)
        known = self.known[own]
        index = own[..., None, None].expand(-1, -1, -1, 1, per_class)
        nearest = self._similarity(features).gather(3, index).squeeze(3).argmax(dim=-1)
        inside = (label < num_classes) & (label >= 0)
        group = torch.where(inside, own * per_class + nearest, -1)
        # With variances of one the precision is the number of pixels and the weighted mean their sum.
        statistics = prototype_statistics(
            features, torch.ones_like(features), group, valid & inside & known, num_classes * per_class
        )
        total = summed(torch.cat([statistics.weighted_mean, statistics.precision[:, :1]], dim=1))
        count = total[:, dim:]
        mean = total[:, :dim] / count.clamp(min=1)
        moved = torch.lerp(mean, self.prototypes.flatten(0, 1), self.decay)
        self.prototypes.copy_(
            torch.where(count > 0, moved, self.prototypes.flatten(0, 1)).view_as(self.prototypes)
        )
