"""Negatives: for each anchor a class from the given distribution, then a pixel of that class, uniformly.

The element of negative n of anchor a of class c is (c * A + a) * N + n. The class comes from (w0, w1), the
pixel from (w2, w3): weights q[c, k] = floor(p[c, k] * 2^31) in float64 with p clamped to [0, 1] and NaN taken
as 0, and q[c, k] = 0 where k = c or where class k has no valid pixel; Q[c, k] = min(q[c, 0] + ... + q[c, k],
2^31); T = Q[c, C-1]; k = number of values of Q[c, :] that are <= bounded(w0, w1, T);
index = list_k[bounded(w2, w3, n_k)], where list_k holds the class's n_k valid pixels, ascending. T = 0 gives
-1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prcl_fast.reference.philox import NEGATIVES, bounded, philox_words

# Draws per pass. On a CPU the working set should stay in the cache, on a GPU launches should be few.
_CHUNK = {"cpu": 1 << 15, "cuda": 1 << 22}
_ONE = 1 << 31


def sample_negatives(
    class_probability: Tensor,
    order: Tensor,
    start: Tensor,
    num_anchors: int,
    num_negatives: int,
    seed: Tensor,
) -> Tensor:
    """[C, A, N] int64 flat indices from the class lists of the valid pixels, -1 where none can be drawn."""
    num_classes = class_probability.shape[0]
    start, count = start[:-1].long(), start.diff().long()
    cumulative = cumulative_weights(class_probability, count)  # [C, C]

    per_class = num_anchors * num_negatives
    index = torch.empty(num_classes, per_class, dtype=torch.int64, device=order.device)
    step = max(1, _CHUNK.get(order.device.type, 1 << 22) // num_classes)
    first = torch.arange(num_classes, device=order.device)[:, None] * per_class
    for begin in range(0, per_class, step):
        end = min(begin + step, per_class)
        element = first + torch.arange(begin, end, device=order.device)  # [C, chunk]
        w0, w1, w2, w3 = philox_words(seed, element, NEGATIVES)
        x = bounded(w0, w1, cumulative[:, -1:])
        drawn_class = torch.searchsorted(cumulative, x, right=True).clamp_(max=num_classes - 1)
        position = start[drawn_class] + bounded(w2, w3, count[drawn_class])
        index[:, begin:end] = order[position.clamp_(max=order.numel() - 1)]
    index.masked_fill_(cumulative[:, -1:] == 0, -1)
    return index.view(num_classes, num_anchors, num_negatives)


def cumulative_weights(class_probability: Tensor, count: Tensor) -> Tensor:
    """[C, C] int64: each row's inclusive sums of floor(p * 2^31) over other classes with a valid pixel.

    A row is cut at 2^31, so that rounding in the probabilities, or a row that sums to more than one, cannot
    make a draw overflow.
    """
    p = class_probability.double().nan_to_num(nan=0.0).clamp(0.0, 1.0)
    weight = torch.floor(p * _ONE).long()
    itself = torch.eye(p.shape[0], dtype=torch.bool, device=p.device)
    return weight.masked_fill(itself | (count == 0)[None, :], 0).cumsum(1).clamp(max=_ONE)
