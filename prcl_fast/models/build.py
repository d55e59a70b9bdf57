"""Networks from a configuration, with random weights."""

from __future__ import annotations

from functools import partial

from prcl_fast.config import ModelConfig
from prcl_fast.config.methods import PPSConfig
from prcl_fast.models.network import SegmentationNetwork
from prcl_fast.models.query_head import QueryHead


def build_network(
    model: ModelConfig,
    num_classes: int,
    *,
    representation: bool = False,
    probability: bool = False,
    initial_variance: float = 0.5,
    queries: PPSConfig | None = None,
) -> SegmentationNetwork:
    """The network of a configuration, with random weights. The trainer loads `model.weights`.

    Args:
        model: the configuration's `model` section.
        num_classes: number of classes of the data.
        representation, probability, initial_variance: the heads that the method needs.
        queries: settings of a query head, in place of the linear classifier.
    """
    query_head = None
    if queries is not None:
        query_head = partial(
            QueryHead,
            dim=model.dim,
            num_classes=num_classes,
            per_class=queries.prototypes,
            layers=queries.layers,
            heads=queries.heads,
            projection_dim=queries.projection_dim,
        )
    return SegmentationNetwork(
        model.backbone,
        model.stem,
        model.output_stride,
        base_width=model.base_width,
        num_classes=num_classes,
        width=model.width,
        representation_dim=model.dim if representation else None,
        probability=probability,
        initial_variance=initial_variance,
        query_head=query_head,
    )
