"""Losses L_s, L_u and L_c, and the schedules of their weight and of the learning rate."""

from prcl_fast.losses.contrast import ProbabilisticContrast
from prcl_fast.losses.diagnostics import explain_inert, explain_variance
from prcl_fast.losses.feature_bank import FeatureBank
from prcl_fast.losses.prototype_predictor import PrototypePredictor
from prcl_fast.losses.prototypical import odds_logits, one_prototype_per_class, prototypical_contrast
from prcl_fast.losses.schedules import lambda_c, poly_lr
from prcl_fast.losses.segmentation import PixelCounts, start_counting, supervised_loss, unsupervised_loss

__all__ = [
    "FeatureBank",
    "PixelCounts",
    "ProbabilisticContrast",
    "PrototypePredictor",
    "explain_inert",
    "explain_variance",
    "lambda_c",
    "odds_logits",
    "one_prototype_per_class",
    "poly_lr",
    "prototypical_contrast",
    "start_counting",
    "supervised_loss",
    "unsupervised_loss",
]
