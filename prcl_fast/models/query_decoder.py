"""The transformer decoder of PPS: from learned queries to the prototypes of an image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Hidden width of a layer over its width: 2048 for 256.
_EXPANSION = 8


class QueryDecoderLayer(nn.Module):
    """Attention among the queries, attention to the image, two linear layers: [B, N, D] -> the same.

    A residual sum and LayerNorm follow each. Queries are added to the queries and keys of attention, not to
    its values.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.cross_attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.linear1 = nn.Linear(dim, _EXPANSION * dim)
        self.linear2 = nn.Linear(_EXPANSION * dim, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, target: Tensor, queries: Tensor, memory: Tensor, keys: Tensor) -> Tensor:
        """`memory` [B, h * w, D] gives the values; `keys` are the same plus positions."""
        query = target + queries
        target = self.norm1(target + self.self_attention(query, query, target, need_weights=False)[0])
        query = target + queries
        target = self.norm2(target + self.cross_attention(query, keys, memory, need_weights=False)[0])
        return self.norm3(target + self.linear2(F.relu(self.linear1(target))))


class QueryDecoder(nn.Module):
    """The backbone's last map -> mask embeddings M, the image's prototypes: [B, in, h, w] -> [B, N, D].

    Source: Chen and Lian (ACM MM 2022), section 3.3: a multi-layer transformer decoder reads "a feature map
    extracted by the backbone" and N_p learnable queries, "inspired by MaskFormer". Details that the paper
    leaves open follow MaskFormer: a 1x1 projection, sine positions on the map, queries as positions on a
    target of zeros, LayerNorm after each sum, and a mask embedding of three linear layers. MaskFormer's
    dropout of 0.1 is left out: every draw of a step must be a function of (seed, step), and PyTorch's
    generator is not.

    Args:
        in_channels: of the map.
        dim: D, a multiple of `heads` and of 4.
        number: N, of queries.
        layers, heads: of the transformer.
    """

    def __init__(self, in_channels: int, dim: int, number: int, *, layers: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(number, dim))
        self.project = nn.Conv2d(in_channels, dim, 1)
        self.layers = nn.ModuleList([QueryDecoderLayer(dim, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(dim)
        self.mask_embed = nn.Sequential(
            *(nn.Linear(dim, dim), nn.ReLU(inplace=True)),
            *(nn.Linear(dim, dim), nn.ReLU(inplace=True)),
            nn.Linear(dim, dim),
        )
        for parameter in self.layers.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.kaiming_uniform_(self.project.weight, a=1)
        assert self.project.bias is not None
        nn.init.zeros_(self.project.bias)

    def forward(self, features: Tensor) -> Tensor:
        """The prototypes of each image, not normalised."""
        pixels = self.project(features).permute(0, 2, 3, 1)
        positions = sine_positions(*pixels.shape[1:], device=pixels.device).to(pixels.dtype)
        memory = pixels.flatten(1, 2)
        keys = memory + positions
        queries = self.queries.expand(len(features), -1, -1)
        target = torch.zeros_like(queries)
        for layer in self.layers:
            target = layer(target, queries, memory, keys)
        prototypes: Tensor = self.mask_embed(self.norm(target))
        return prototypes


def sine_positions(height: int, width: int, dim: int, *, device: torch.device) -> Tensor:
    """[height * width, dim] float32: sines and cosines of each pixel's row, then of its column.

    Rows and columns run from 0 (exclusive) to 2 pi. Each has half of the dimensions, in pairs (sin, cos) with
    wavelengths up to 10000 times longer (Carion et al., DETR, 2020).
    """
    half = dim // 2
    period = 10000.0 ** (2 * torch.arange(half // 2, device=device) / half)

    def along(size: int) -> Tensor:
        angle = torch.arange(1, size + 1, device=device)[:, None] * (2 * math.pi / size) / period
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)

    rows = along(height)[:, None].expand(-1, width, -1)
    columns = along(width)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)
