"""Class prototypes for drawing: those that a run keeps, or means of the drawn pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prcl_fast.analysis.embedding import Embedding
from prcl_fast.config.methods import MethodConfig, PCRConfig, PRCLConfig
from prcl_fast.data.pixel_draws import DrawnPixels
from prcl_fast.losses.virtual_negatives import draw_virtual_negatives
from prcl_fast.ops import PrototypeStatistics, prototype_statistics


@dataclass(frozen=True)
class Prototypes:
    """K prototypes of each of C classes, and their origin in words.

    Attributes:
        mean: float64 [C, K, D], nan for a class without prototypes.
    """

    mean: np.ndarray
    origin: str


def stored_prototypes(method: MethodConfig, state: Mapping[str, Tensor]) -> Prototypes | None:
    """The prototypes that a run of PRCL or PCR keeps; None for other methods, and with `prototype: local`.

    Args:
        state: the method's state in a checkpoint.
    """
    if isinstance(method, PCRConfig):
        known = state["predictor.known"][:, None, None]
        mean = torch.where(known, state["predictor.prototypes"].double(), torch.nan).numpy()
        return Prototypes(mean, "kept by the run, K-means and running average, of the student's pixels")
    if not isinstance(method, PRCLConfig) or method.prototype == "local":
        return None
    count = state["contrast.count"]
    if method.prototype == "global":
        precision, weighted_mean = state["contrast.precision"], state["contrast.weighted_mean"]
    else:
        precision = state["contrast.variance"].reciprocal()
        weighted_mean = precision * state["contrast.mean"]
    origin = f"kept by the run, prototype {method.prototype}, of the student's pixels"
    return _distributions(PrototypeStatistics(precision, weighted_mean, count), origin)


def pixel_prototypes(embedding: Embedding, drawn: DrawnPixels, num_classes: int) -> Prototypes:
    """Eq. (4) over the drawn pixels of each class, weighted by precision if there is a variance."""

    def as_map(rows: np.ndarray) -> Tensor:  # [P, D] -> [1, D, P, 1]
        return torch.from_numpy(rows.T.copy())[None, :, :, None]

    mu = as_map(embedding.representation)
    var = torch.ones_like(mu) if embedding.variance is None else as_map(embedding.variance)
    group = torch.from_numpy(drawn.group)[None, :, None]
    valid = torch.ones_like(group, dtype=torch.bool)
    weighted = "" if embedding.variance is None else "precision-weighted "
    origin = f"{weighted}mean of the drawn pixels, because the run keeps none"
    return _distributions(prototype_statistics(mu, var, group, valid, num_classes), origin)


def stored_virtual_negatives(
    method: MethodConfig, state: Mapping[str, Tensor], seed: int
) -> np.ndarray | None:
    """[C, V, D], drawn from the run's GDPs; nan for a class without one, None for V = 0.

    Args:
        state: the method's state in a checkpoint.
    """
    if not isinstance(method, PRCLConfig) or not method.virtual_negatives:
        return None
    known = state["contrast.count"] > 0
    prototypes = PrototypeStatistics(
        state["contrast.precision"], state["contrast.weighted_mean"], state["contrast.count"]
    )
    spread = prototypes.variance
    if method.virtual_spread == "class":
        spread = state["contrast.spread"].double().sqrt()
    drawn = draw_virtual_negatives(
        prototypes,
        method.virtual_negatives,
        method.beta,
        torch.tensor([seed, 0]),
        spread,
    )
    return torch.where(known[:, None, None], drawn.double(), torch.nan).numpy()


def _distributions(statistics: PrototypeStatistics, origin: str) -> Prototypes:
    mean = torch.where(statistics.count[:, None] > 0, statistics.mean.double(), torch.nan)
    return Prototypes(mean[:, None].numpy(), origin)
