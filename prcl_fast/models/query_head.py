"""The query head of PPS: class scores from prototypes that a transformer decoder computes for each image."""

from __future__ import annotations

from torch import Tensor, nn

from prcl_fast.models.heads import RepresentationHead
from prcl_fast.models.query_decoder import QueryDecoder


class QueryHead(nn.Module):
    """Features of decoder and backbone -> prototype scores of each pixel, and logits [B, C, h, w].

    A pixel's score for a prototype is the dot product of its embedding F[:, i] with the prototype, a column
    of M. A class's logit S is the sum of the scores of its n prototypes.

    Source: Chen and Lian (ACM MM 2022), section 3.3 and eq. (8). The function f of eq. (9), which does not
    change the argmax, is in `losses.prototypical`.

    Args:
        in_channels, hidden_channels: of the embedding's 3x3 convolution.
        high_channels: of the backbone's last map.
        dim: d, of embeddings, queries and prototypes.
        num_classes: C.
        per_class: n, prototypes per class.
        layers, heads: of the transformer decoder.
        projection_dim: of F_p, the embedding after the projector Phi, two 1x1 convolutions with a ReLU.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        high_channels: int,
        dim: int,
        num_classes: int,
        *,
        per_class: int,
        layers: int,
        heads: int,
        projection_dim: int,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding = RepresentationHead(in_channels, hidden_channels, dim)
        self.decoder = QueryDecoder(high_channels, dim, num_classes * per_class, layers=layers, heads=heads)
        self.projector = nn.Sequential(
            nn.Conv2d(dim, dim, 1), nn.ReLU(inplace=True), nn.Conv2d(dim, projection_dim, 1)
        )

    def forward(
        self, features: Tensor, high: Tensor, *, project: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Class logits, prototype scores and projection of every pixel.

        Args:
            features: [B, in_channels, h, w], the DeepLabv3+ decoder's.
            high: [B, high_channels, h', w'], the backbone's last map.
            project: whether to compute the projection.

        Returns:
            logits [B, C, h, w]; scores P_m [B, C * n, h, w], prototype j of class c at channel c * n + j;
            projection F_p [B, projection_dim, h, w], or None.
        """
        embedding = self.embedding(features)
        prototypes = self.decoder(high)  # [B, C * n, d]
        # Pixels as rows: a matrix product whose result and gradient are channels_last.
        pixels = embedding.permute(0, 2, 3, 1)
        scores = (pixels.flatten(1, 2) @ prototypes.mT).unflatten(1, pixels.shape[1:3])  # [B, h, w, C * n]
        logits = scores.unflatten(-1, (self.num_classes, -1)).sum(dim=-1)
        projection = self.projector(embedding) if project else None
        return logits.permute(0, 3, 1, 2), scores.permute(0, 3, 1, 2), projection
