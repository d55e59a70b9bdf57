"""The three losses, L_s, L_u and L_c, and how their weight and the learning rate move over training."""

from prcl_fast.losses.contrast import ProbabilisticContrast
from prcl_fast.losses.diagnostics import explain_inert
from prcl_fast.losses.schedules import lambda_c, poly_lr
from prcl_fast.losses.segmentation import supervised_loss, unsupervised_loss

__all__ = [
    "ProbabilisticContrast",
    "explain_inert",
    "lambda_c",
    "poly_lr",
    "supervised_loss",
    "unsupervised_loss",
]
