"""What the contrast did in its last step, and a plain sentence where it did nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

_AT_CHANCE = 1e-3
_SATURATED = 1e-3
# Of a variance between 0 and 1 that starts near 1/2.
_EXPLODED = 0.95
_COLLAPSED = 1e-3


def chance_level(present: Tensor, hard: Tensor, known: Tensor, negatives: int, points: int) -> Tensor:
    """What eq. (15) is if all scores are equal: the mean over the classes present of log(1 + negatives).

    Args:
        present: [C] bool, classes with valid pixels.
        hard: [C] bool, classes with anchors; the others count as 0.
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
    """Why the contrast is 0 or trains nothing in the step that `diagnostics` describes; None where it works.

    Reads the tensors, so on a GPU it waits for the step: call it on logging steps only.

    Args:
        diagnostics: `ProbabilisticContrast.diagnostics`.
    """
    valid = diagnostics["valid_per_class"]
    hard = diagnostics["hard_per_class"]
    loss, chance = float(diagnostics["loss"]), float(diagnostics["chance_level"])
    if not math.isfinite(loss):
        return f"the contrast is {loss}: the representations or their variances are no longer finite"
    if int(valid.sum()) == 0:
        return "no valid pixel: nothing is labeled and no pseudo-label reaches delta_w; the contrast is 0"
    if int(hard.sum()) == 0:
        return "no hard pixel: every valid one has a confidence of at least delta_s, so there is no anchor"
    if chance == 0:
        name = int(valid.argmax())
        return (
            f"only class {name} has valid pixels or a prototype, so there is no negative; the contrast is 0"
        )
    if abs(loss - chance) <= _AT_CHANCE * chance:
        return (
            f"the contrast, {loss:.4f}, is at the chance level, {chance:.4f}: tau is too large "
            "for its scores, and its gradients are next to nothing"
        )
    if loss <= _SATURATED * chance:
        return (
            f"the contrast, {loss:.2e}, is next to 0 against a chance level of {chance:.4f}: "
            "tau is too small for its scores, or the classes are already separated"
        )
    return None


def explain_variance(mean: float) -> str | None:
    """What is wrong with a mean variance sigma^2, between 0 and 1, and what helps; None where nothing is.

    Both papers hold the probability head back by a small learning rate ("soft freezing"), for the contrast
    also falls when every pixel is called uncertain.
    """
    if mean > _EXPLODED:
        return (
            f"the variances explode: their mean is {mean:.3f} of at most 1, every pixel is called uncertain; "
            "lower optim.probability_lr (5e-5 in the IJCV paper) or method.lambda_c"
        )
    if mean < _COLLAPSED:
        return (
            f"the variances collapse: their mean is {mean:.1e}, and the precisions of the prototypes grow "
            "without bound; lower optim.probability_lr (5e-5 in the IJCV paper) or raise method.tau"
        )
    return None
