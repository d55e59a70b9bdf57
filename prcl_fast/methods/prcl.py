"""PRCL: probabilistic representation contrastive learning; `PRCL.losses` is Algorithm 1 of the paper."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from prcl_fast.config import Config
from prcl_fast.config.methods import PRCLConfig
from prcl_fast.data.batches import Batch
from prcl_fast.data.source import IGNORE
from prcl_fast.errors import InputError
from prcl_fast.losses import ProbabilisticContrast, explain_inert, explain_variance, lambda_c
from prcl_fast.methods.base import StepIndex, check_draws_of_step
from prcl_fast.methods.mean_teacher import MeanTeacher, PseudoLabeled
from prcl_fast.models.build import build_network
from prcl_fast.models.network import NetworkOutput, SegmentationNetwork, at_resolution
from prcl_fast.processes.collectives import world_size
from prcl_fast.step_parts import part


class PRCL(MeanTeacher):
    """L = L_s + L_u + lambda_c(t) L_c, eq. (11), on Gaussians N(mu, sigma^2 I) for every pixel."""

    settings: PRCLConfig
    unlabeled_terms: tuple[str, ...] = (*MeanTeacher.unlabeled_terms, "loss_contrast")

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__(config, num_classes)
        bank = self.settings.memory_bank
        if 0 < bank < world_size():
            raise InputError(
                f"method.memory_bank: at least one place for each of {world_size()} processes, got {bank}"
            )
        sets = self.settings.anchors // self.settings.anchors_per_set
        check_draws_of_step(
            "classes * method.anchors / method.anchors_per_set * method.negatives",
            num_classes * sets * self.settings.negatives,
        )
        check_draws_of_step(
            "classes * method.virtual_negatives * model.dim",
            num_classes * self.settings.virtual_negatives * config.model.dim,
        )
        self.contrast = ProbabilisticContrast(num_classes, config.model.dim, self.settings)
        self._mu: Tensor | None = None
        self._var: Tensor | None = None
        self._lambda_c: Tensor | None = None

    def new_network(self, config: Config, num_classes: int) -> SegmentationNetwork:
        """With a head for the means and, for probabilistic representations, one for the variances."""
        return build_network(
            config.model,
            num_classes,
            representation=True,
            probability=self.settings.representation == "probabilistic",
            initial_variance=self.settings.initial_variance,
        )

    def losses(self, batch: Batch, step: StepIndex) -> dict[str, Tensor]:
        """Algorithm 1: L_s and L_u as in MeanTeacher, then L_c over labeled and unlabeled pixels together."""
        unlabeled = self.pseudo_labeled(batch)
        output = self.student_pass(batch, unlabeled, representations=True)
        losses = self.segmentation_losses(batch, unlabeled, output.logits)
        with part("contrast"):
            contrast = self._contrastive_loss(batch, unlabeled, output)
            weight = lambda_c(
                self.settings.lambda_c,
                step.iteration - self.warmup,
                step.total - self.warmup,
                alpha=self.settings.alpha,
            )
            self._lambda_c = weight.to(contrast.dtype)
            losses["loss"] = losses["loss"] + self._lambda_c * contrast
        losses["loss_contrast"] = contrast
        return losses

    def _contrastive_loss(self, batch: Batch, unlabeled: PseudoLabeled, output: NetworkOutput) -> Tensor:
        """Eq. (15) at the decoder's resolution; labels are read at the pixels that upsampling aligns."""
        mu, var = output.mu, output.var
        assert mu is not None
        size = mu.shape[-2:]
        label = at_resolution(torch.cat([batch.label, unlabeled.label]), size)
        # A labeled pixel has confidence 1; an unlabeled pixel has the teacher's confidence.
        teacher = torch.cat([torch.ones_like(batch.label, dtype=torch.float32), unlabeled.confidence])
        teacher = at_resolution(teacher, size)
        valid = (label != IGNORE) & (teacher >= self.settings.delta_w)
        student = _probability_of(label, output.logits)
        confidence = student
        if self.settings.confidence == "teacher":
            # The teacher does not see labeled images: the student decides which of their pixels are hard.
            count = len(batch.label)
            confidence = torch.cat([student[:count], teacher[count:]])
        self._mu, self._var = mu.detach(), None if var is None else var.detach()
        loss: Tensor = self.contrast(mu, var, label, valid, confidence, batch.seed)
        return loss

    def diagnostics(self) -> dict[str, Any]:
        """The contrast beside its chance level, its sampling, and the spread of the representation."""
        values = super().diagnostics()
        if self._lambda_c is not None:
            values["lambda_c"] = float(self._lambda_c)
        for name, tensor in (("mu", self._mu), ("variance", self._var)):
            if tensor is not None:
                values[f"{name}_mean"] = float(tensor.float().mean())
                values[f"{name}_std"] = float(tensor.float().std())
        if self._mu is not None and self._var is not None:
            values["variance_norm_correlation"] = _correlation_with_norm(self._mu, self._var)
        found = self.contrast.diagnostics
        if not found:
            return values
        values |= {
            "chance": float(found["chance_level"]),
            "valid": found["valid_per_class"].tolist(),
            "hard": found["hard_per_class"].tolist(),
            "anchors": found["anchors_per_class"].tolist(),
            "negatives": int(found["negatives"]),
            "classes_present": int(found["present_classes"]),
            "classes_virtual": int(found["virtual_classes"]),
        }
        if self.contrast.bank is not None:
            values["memory_bank_bytes"] = self.contrast.bank.nbytes
        values |= self._terms()
        if "prototype_shift" in found:
            values["prototype_shift"] = [
                None if math.isnan(shift) else shift for shift in found["prototype_shift"].tolist()
            ]
        reason = explain_inert(found)
        if reason is None and "variance_mean" in values:
            reason = explain_variance(values["variance_mean"])
        return values if reason is None else values | {"note": reason}

    def _terms(self) -> dict[str, float | None]:
        """Mass and spread of the terms in the last step's softmax; None where a number is undefined."""
        terms = self.contrast.terms
        if terms is None:
            return {}
        values = {f"mass_{name}": mass for name, mass in terms.masses().items()}
        values |= {"negative_classes": terms.negative_classes(), "virtual_spread": terms.virtual_spread()}
        return {name: None if math.isnan(value) else value for name, value in values.items()}


def _correlation_with_norm(mu: Tensor, var: Tensor) -> float | None:
    """The correlation over pixels of sigma^2 (its mean over D) with |mu|; None where either is constant.

    Near 1, sigma^2 only encodes the length of mu.
    """
    pairs = torch.stack([var.float().mean(dim=1).flatten(), mu.float().norm(dim=1).flatten()])
    value = float(torch.corrcoef(pairs.double())[0, 1])
    return value if math.isfinite(value) else None


@torch.no_grad()
def _probability_of(label: Tensor, logits: Tensor) -> Tensor:
    """The softmax of [B, C, h, w] logits at each pixel's class; an ignored pixel reads class 0."""
    index = label.masked_fill(label == IGNORE, 0).long().unsqueeze(1)
    return logits.float().softmax(dim=1).gather(1, index).squeeze(1)
