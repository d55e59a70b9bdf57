"""Ops of the contrast, the losses and the network, and the choice of their backend."""

from prcl_fast.ops.class_lists import ClassLists, class_lists
from prcl_fast.ops.mutual_likelihood_score import mutual_likelihood_score
from prcl_fast.ops.philox_normal import Purpose, philox_normal
from prcl_fast.ops.probabilistic_info_nce import probabilistic_info_nce
from prcl_fast.ops.prototype_statistics import PrototypeStatistics, prototype_statistics
from prcl_fast.ops.pseudo_label import pseudo_label
from prcl_fast.ops.registry import use_backend
from prcl_fast.ops.sample_anchors import sample_anchors
from prcl_fast.ops.sample_negatives import sample_negatives
from prcl_fast.ops.upsample_bilinear import upsample_bilinear
from prcl_fast.ops.upsample_cross_entropy import upsample_cross_entropy
from prcl_fast.ops.variance_head import Collectives, variance_head

__all__ = [
    "ClassLists",
    "Collectives",
    "PrototypeStatistics",
    "Purpose",
    "class_lists",
    "mutual_likelihood_score",
    "philox_normal",
    "probabilistic_info_nce",
    "prototype_statistics",
    "pseudo_label",
    "sample_anchors",
    "sample_negatives",
    "upsample_bilinear",
    "upsample_cross_entropy",
    "use_backend",
    "variance_head",
]
