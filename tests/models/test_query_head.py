"""The query head of PPS: transformer decoder, dot products, and sums of eq. (8)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from prcl_fast.models.query_decoder import QueryDecoder, sine_positions
from prcl_fast.models.query_head import QueryHead
from support.plain_pps import CLOSE, C, D, K, N, draw


def attention(layer: torch.nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax of scaled dot products, head by head, of rows [N, D]."""
    dim, heads = layer.embed_dim, layer.num_heads
    q, k, v = (
        x @ layer.in_proj_weight[i * dim : (i + 1) * dim].T + layer.in_proj_bias[i * dim : (i + 1) * dim]
        for i, x in enumerate((query, key, value))
    )
    size = dim // heads
    found = []
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        found.append((q[:, own] @ k[:, own].T / math.sqrt(size)).softmax(1) @ v[:, own])
    return torch.cat(found, dim=1) @ layer.out_proj.weight.T + layer.out_proj.bias


def plain_decoder(decoder: QueryDecoder, features: Tensor) -> Tensor:
    """MaskFormer's decoder (post-norm) and mask embedding on one map [in, h, w], without its dropout."""
    _, height, width = features.shape
    weight, bias = decoder.project.weight[:, :, 0, 0], decoder.project.bias
    assert bias is not None
    memory = torch.stack([weight @ features[:, y, x] + bias for y in range(height) for x in range(width)])
    dim = memory.shape[1]
    positions = torch.zeros_like(memory)
    for y in range(height):
        for x in range(width):
            for i in range(dim // 2):
                period = 10000 ** (2 * (i // 2) / (dim // 2))
                wave = math.cos if i % 2 else math.sin
                positions[y * width + x, i] = wave((y + 1) / height * 2 * math.pi / period)
                positions[y * width + x, dim // 2 + i] = wave((x + 1) / width * 2 * math.pi / period)
    target, queries = torch.zeros_like(decoder.queries), decoder.queries
    for layer in decoder.layers:
        own = attention(layer.self_attention, target + queries, target + queries, target)
        target = layer.norm1(target + own)
        seen = attention(layer.cross_attention, target + queries, memory + positions, memory)
        target = layer.norm2(target + seen)
        target = layer.norm3(target + layer.linear2(layer.linear1(target).clamp(min=0)))
    target = decoder.norm(target)
    for linear in (decoder.mask_embed[0], decoder.mask_embed[2]):
        target = linear(target).clamp(min=0)
    return decoder.mask_embed[4](target)


def test_prototypes_are_what_a_transformer_decoder_makes_of_queries_and_the_backbones_map() -> None:
    torch.manual_seed(0)
    decoder = QueryDecoder(6, 8, K, layers=2, heads=2).double()
    features = draw(2, 6, 3, 4)
    prototypes = decoder(features)
    for image in range(2):
        # Positions are float32.
        torch.testing.assert_close(prototypes[image], plain_decoder(decoder, features[image]), **CLOSE)
    assert decoder.layers[0].linear1.out_features == 64
    assert QueryDecoder(6, 256, K, layers=1, heads=8).layers[0].linear1.out_features == 2048  # MaskFormer's


def test_sine_positions_tell_rows_and_columns_apart() -> None:
    positions = sine_positions(3, 4, 8, device=torch.device("cpu"))
    assert len(positions.unique(dim=0)) == 12
    assert torch.equal(positions.view(3, 4, 8)[:, 0, :4], positions.view(3, 4, 8)[:, 3, :4])
    assert torch.equal(positions.view(3, 4, 8)[0, :, 4:], positions.view(3, 4, 8)[2, :, 4:])


def head(**settings: Any) -> QueryHead:
    torch.manual_seed(0)
    given = {"per_class": N, "layers": 1, "heads": 2, "projection_dim": 3} | settings
    return QueryHead(5, 8, 6, D, C, **given).double().eval()


def test_scores_are_dot_products_and_a_class_has_the_sum_of_its_prototypes_eq_8() -> None:
    own = head()
    features, high = draw(2, 5, 6, 7), draw(2, 6, 2, 3, seed=1)
    logits, scores, projection = own(features, high, project=True)
    embedding, prototypes = own.embedding(features), own.decoder(high)
    assert projection.shape == (2, 3, 6, 7)
    for b in range(2):
        for y in range(6):
            for x in range(7):
                plain = [embedding[b, :, y, x] @ prototypes[b, k] for k in range(K)]
                torch.testing.assert_close(scores[b, :, y, x], torch.stack(plain))
                sums = [sum(plain[N * c : N * (c + 1)]) for c in range(C)]
                torch.testing.assert_close(logits[b, :, y, x], torch.stack(sums))
                hidden = own.projector[0].weight[:, :, 0, 0] @ embedding[b, :, y, x] + own.projector[0].bias
                low = own.projector[2].weight[:, :, 0, 0] @ hidden.clamp(min=0) + own.projector[2].bias
                torch.testing.assert_close(projection[b, :, y, x], low)


def test_prototypes_are_made_for_each_image_from_the_backbones_map() -> None:
    own = head()
    features, high = draw(2, 5, 6, 7), draw(2, 6, 2, 3, seed=1)
    _, before, projection = own(features, high, project=False)
    assert projection is None
    high[1] += draw(6, 2, 3, seed=2)
    _, after, _ = own(features, high, project=False)
    assert torch.equal(before[0], after[0])
    assert (before[1] != after[1]).all()
