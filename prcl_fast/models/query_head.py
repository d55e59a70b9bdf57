"""A segmentation head of prototypes, which a transformer decoder makes of learned queries for each image."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prcl_fast.models.heads import RepresentationHead

# Attention reads the pixels at the output stride: every fourth of each direction at stride 4.
_POOL = 4


class PrototypeScores(NamedTuple):
    """What a head of prototypes knows beside the logits."""

    scores: Tensor  # [B, C * n, h, w], similarity of every pixel with every prototype, over tau
    prototypes: Tensor  # [B, C, n, D]


class QueryHead(nn.Module):
    """Decoder features -> prototypes of each image -> scores of its pixels: [B, in, h, w] -> [B, C, h, w].

    n queries for each class attend to one another and to the image's embedded pixels; what they become are
    the image's prototypes. A pixel's score for a prototype is their cosine over tau, and a class's logit the
    score of the class's nearest prototype: many prototypes, one class.

    Args:
        in_channels, hidden_channels: of the embedding's 3x3 convolution.
        dim: D, of embedding, queries and prototypes.
        num_classes: C.
        per_class: n.
        layers, heads: of the transformer decoder; heads divides dim.
        tau: temperature of the scores.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        dim: int,
        num_classes: int,
        *,
        per_class: int,
        layers: int,
        heads: int,
        tau: float,
    ) -> None:
        super().__init__()
        self.tau, self.shape = tau, (num_classes, per_class)
        self.embedding = RepresentationHead(in_channels, hidden_channels, dim)
        self.queries = nn.Parameter(torch.randn(num_classes * per_class, dim))
        layer = nn.TransformerDecoderLayer(
            dim, heads, dim_feedforward=4 * dim, dropout=0.0, batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, layers, norm=nn.LayerNorm(dim))

    def forward(self, features: Tensor) -> tuple[Tensor, PrototypeScores]:
        """The logits [B, C, h, w] and what they come from."""
        embedding = self.embedding(features)
        pixels = F.avg_pool2d(embedding, _POOL, ceil_mode=True).flatten(2).transpose(1, 2)
        queries = self.queries.expand(len(features), -1, -1)
        prototypes = self.decoder(queries, pixels)  # [B, C * n, D]
        # Rows of pixels: a product of matrices whose result, and gradient, is channels_last.
        rows = F.normalize(embedding, dim=1).permute(0, 2, 3, 1)
        similarity = rows.flatten(1, 2) @ F.normalize(prototypes, dim=-1).mT  # [B, h * w, C * n]
        scores = (similarity / self.tau).unflatten(1, rows.shape[1:3]).permute(0, 3, 1, 2)
        logits = of_nearest(scores, self.shape[0])
        return logits, PrototypeScores(scores, prototypes.unflatten(1, self.shape))


def of_nearest(scores: Tensor, num_classes: int) -> Tensor:
    """Scores of prototypes [B, C * n, h, w] -> of each class's nearest one, [B, C, h, w] in channels_last."""
    rows = scores.permute(0, 2, 3, 1).unflatten(-1, (num_classes, -1))
    return rows.amax(dim=-1).permute(0, 3, 1, 2)
