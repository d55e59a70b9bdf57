"""Diagnostics of the contrast: numbers of a step, and warnings about a contrast without effect."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from prcl_fast.config.contrast import ContrastConfig
from prcl_fast.losses.batch_prototypes import BatchPrototypes
from prcl_fast.processes.collectives import world_size

_AT_CHANCE = 1e-3
_SATURATED = 1e-3
# Limits of the mean variance, which lies between 0 and 1.
_EXPLODED = 0.95
_COLLAPSED = 1e-3


@torch.no_grad()
def step_diagnostics(
    settings: ContrastConfig,
    loss: Tensor,
    batch: BatchPrototypes,
    negatives: Tensor,
    known: Tensor | None,
    before: Tensor | None,
    after: Tensor | None,
) -> dict[str, Tensor]:
    """Numbers of one step as tensors on the device; nothing waits for them.

    Args:
        loss: of the step.
        batch: prototypes and pixel counts of all processes.
        negatives: [C, groups, N] indices of this process's real negatives, -1 for none.
        known: [C] bool, classes with virtual negatives or rows in the memory bank.
        before, after: [C, D], means of the stored prototypes before and after the step, nan for none.
    Returns:
        valid_per_class, hard_per_class [C]: pixels of all processes; anchors_per_class [C]: upper bound of
        distinct anchors; present_classes; negatives: real negatives of this process's anchors;
        virtual_classes: classes of `known`; loss; chance_level: the loss if all scores were equal;
        prototype_shift [C], if prototypes are stored: distance between a class's L2-normalised prototypes
        before and after the step, nan without one.
    """
    present = batch.statistics.count > 0
    points = settings.virtual_negatives or (settings.bank_negatives if settings.memory_bank else 0)
    known = torch.zeros_like(present) if known is None else known
    diagnostics = {
        "valid_per_class": batch.statistics.count,
        "hard_per_class": batch.hard,
        "anchors_per_class": batch.hard.clamp(max=settings.anchors * world_size()),
        "present_classes": present.sum(),
        # A class has all of its negatives or none, so the first entry suffices.
        "negatives": (negatives[:, 0, 0] >= 0).sum() * (settings.anchors * settings.negatives),
        "virtual_classes": known.sum(),
        "loss": loss.detach(),
        "chance_level": chance_level(present, batch.hard > 0, known, settings.negatives, points),
    }
    if before is not None and after is not None:
        shift = F.normalize(after, dim=1) - F.normalize(before, dim=1)
        diagnostics["prototype_shift"] = shift.norm(dim=1)
    return diagnostics


def chance_level(present: Tensor, hard: Tensor, known: Tensor, negatives: int, points: int) -> Tensor:
    """Value of eq. (15) if all scores are equal: the mean over the classes present of log(1 + negatives).

    Args:
        present: [C] bool, classes with valid pixels.
        hard: [C] bool, classes with anchors; all other classes count as 0.
        known: [C] bool, classes with virtual negatives.
        negatives: real negatives of an anchor, if another class is present.
        points: virtual negatives of a class.
    Returns:
        scalar, float32.
    """
    real = negatives * (present.sum() > 1) * present
    virtual = points * (known.sum() - known.long())
    expected = torch.where(hard, torch.log1p((real + virtual).float()), 0.0)
    return expected.sum() / present.sum().clamp(min=1)


def explain_inert(diagnostics: Mapping[str, Tensor]) -> str | None:
    """The reason why the contrast is 0 or has no effect in the step of `diagnostics`; None if it works.

    Reads the tensors and therefore waits for the step on a GPU: for logging steps only.

    Args:
        diagnostics: `ProbabilisticContrast.diagnostics`.
    """
    valid = diagnostics["valid_per_class"]
    hard = diagnostics["hard_per_class"]
    loss, chance = float(diagnostics["loss"]), float(diagnostics["chance_level"])
    if not math.isfinite(loss):
        return f"the contrast is {loss}: the representations or their variances are no longer finite"
    if int(valid.sum()) == 0:
        return "no valid pixel: none is labeled and no confidence reaches delta_w; the contrast is 0"
    if int(hard.sum()) == 0:
        return "no hard pixel: every valid pixel has a confidence of at least delta_s, so there is no anchor"
    if chance == 0:
        name = int(valid.argmax())
        return (
            f"only class {name} has valid pixels or a prototype, so there is no negative; the contrast is 0"
        )
    if abs(loss - chance) <= _AT_CHANCE * chance:
        return (
            f"the contrast, {loss:.4f}, is at the chance level, {chance:.4f}: tau is too large "
            "for its scores, and its gradients are close to 0"
        )
    if loss <= _SATURATED * chance:
        return (
            f"the contrast, {loss:.2e}, is close to 0, far below its chance level, {chance:.4f}: "
            "tau is too small for its scores, or the classes are already separated"
        )
    return None


def explain_variance(mean: float) -> str | None:
    """A warning about an extreme mean variance sigma^2, with a remedy; None for others.

    The contrast also falls if every pixel gets a large variance. Both papers therefore train the probability
    head at a small learning rate ("soft freezing").
    """
    if mean > _EXPLODED:
        return (
            f"the variances explode: their mean is {mean:.3f} of at most 1, all pixels count as uncertain; "
            "lower optim.probability_lr (5e-5 in the IJCV paper) or method.lambda_c"
        )
    if mean < _COLLAPSED:
        return (
            f"the variances collapse: their mean is {mean:.1e}, and the precisions of the prototypes grow "
            "without bound; lower optim.probability_lr (5e-5 in the IJCV paper) or raise method.tau"
        )
    return None
