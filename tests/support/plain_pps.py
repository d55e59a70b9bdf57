"""Eq. (7) of PPS in plain PyTorch, and what its tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from prcl_fast.ops import sample_anchors, sample_negatives

C, N, D = 3, 2, 4
K = C * N
SEED = torch.tensor([5, 7])
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain_contrast(
    features: Tensor, prototype: Tensor, valid: Tensor, seed: Tensor, tau: float, n: int, r: int
) -> Tensor:
    """Eq. (7) pixel by pixel, of the pixels that the samplers draw, as a mean over its terms."""
    pixels = features.movedim(1, -1).reshape(-1, features.shape[1])
    assigned, known = prototype.flatten(), valid.flatten()
    anchors = sample_anchors(prototype, valid, valid, K, n, seed)
    uniform = torch.zeros(K, K, dtype=torch.float64)
    present = sorted(set(assigned[known].tolist()))
    for k in present:
        for other in present:
            if other != k and len(present) > 1:
                uniform[k, other] = 1 / (len(present) - 1)
    negatives = sample_negatives(uniform, prototype, valid, K, 1, r, seed)
    total, terms = features.new_zeros(()), 0
    for k in range(K):
        for i in range(n):
            own, positive = int(anchors[k, i]), int(anchors[k, (i + 1) % n])
            if own in (-1, positive) or (negatives[k] < 0).any():
                continue
            assert assigned[own] == assigned[positive] == k  # Psi
            assert known[own]
            assert known[positive]
            numerator = (pixels[own] @ pixels[positive] / tau).exp()
            others = features.new_zeros(())
            for j in negatives[k, 0].tolist():
                assert assigned[j] != k  # O
                assert known[j]
                others = others + (pixels[own] @ pixels[j] / tau).exp()
            total = total - (numerator / (numerator + others)).log()
            terms += 1
    return total / max(terms, 1)
