"""A small scene of anchors, negatives and prototypes for the tests of the InfoNCE, and its exact loss."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prcl_fast.ops import PrototypeStatistics, probabilistic_info_nce
from prcl_fast.reference import probabilistic_info_nce as reference

B, D, H, W = 2, 6, 5, 4
C, A, N, V = 5, 7, 9, 3


def scene(dtype: torch.dtype = torch.float64, var_dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Class 2 is present without anchors, class 4 absent; some negatives are missing; anchors repeat."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    anchor_index = torch.randint(0, B * H * W, (C, A), generator=generator)
    anchor_index[0, 1] = anchor_index[0, 0]
    anchor_index[1, 0] = anchor_index[0, 0]
    anchor_index[[2, 4]] = -1
    negative_index = torch.randint(0, B * H * W, (C, A, N), generator=generator)
    negative_index[torch.rand(C, A, N, generator=generator) < 0.2] = -1
    negative_index[3, 2] = -1
    precision = (1 / (0.05 + draw(C, D))).index_fill(0, torch.tensor(4), 0)
    return {
        "mu": (4 * draw(B, D, H, W) - 2).to(dtype).requires_grad_(),
        "var": (0.02 + draw(B, D, H, W)).to(var_dtype or dtype).requires_grad_(),
        "anchor_index": anchor_index,
        "negative_index": negative_index,
        "positive": PrototypeStatistics(
            precision, precision * (2 * draw(C, D) - 1), torch.tensor([3, 5, 2, 9, 0])
        ),
        "virtual_mu": 2 * draw(C, V, D) - 1,
    }


def by_reference(mu: Tensor, var: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """The reference's loss, on the CPU wherever the test runs; autograd differentiates it."""
    with pytest.MonkeyPatch.context() as patch:
        op = importlib.import_module("prcl_fast.ops.probabilistic_info_nce")
        patch.setattr(op, "_op", reference.probabilistic_info_nce)
        return probabilistic_info_nce(mu, var, *arguments, **options)


def in_float64(mu: Tensor, var: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and gradients to mu and var by the reference in float64."""
    exact = [x.detach().double().requires_grad_() for x in (mu, var)]
    loss = by_reference(*exact, *arguments, **options)
    return loss.detach(), torch.autograd.grad(loss, exact)


def by_hand(
    scene: dict[str, Any],
    *,
    tau: float,
    reduction: str = "sum",
    normalize: bool = False,
    virtual_var: Tensor | None = None,
    virtual_known: Tensor | None = None,
) -> Tensor:
    """Eq. (15) written once more from the paper, a pair at a time: differentiable, in float64.

    C is the classes with an anchor's prototype in the batch, C~_g those that `virtual_known` names.
    """
    num_anchors = scene["anchor_index"].shape[1]
    num_groups = scene["negative_index"].shape[1]
    rows, variances = (
        scene[name].double().movedim(1, -1).reshape(-1, scene[name].shape[1]) for name in ("mu", "var")
    )
    positive, virtual = scene["positive"], scene["virtual_mu"]
    present = [c for c in range(len(positive.count)) if positive.count[c] > 0]
    known = present if virtual_known is None else [c for c, is_known in enumerate(virtual_known) if is_known]

    def score(mu_i: Tensor, s_i: Tensor, mu_j: Tensor, s_j: Tensor) -> Tensor:
        if normalize:
            mu_i, mu_j = F.normalize(mu_i, dim=-1), F.normalize(mu_j, dim=-1)
        terms = (mu_i - mu_j) ** 2 / (s_i + s_j) + torch.log(s_i + s_j)
        return -0.5 * (terms.mean() if reduction == "mean" else terms.sum())

    total = rows.sum() * 0
    for c in present:
        losses = []
        for a in range(num_anchors):
            i = scene["anchor_index"][c, a]
            if i < 0:
                continue
            anchor = rows[i], variances[i]
            scores = [score(*anchor, positive.mean[c].double(), positive.variance[c].double())]
            for j in scene["negative_index"][c, a * num_groups // num_anchors]:
                if j >= 0:
                    scores.append(score(*anchor, rows[j].detach(), variances[j].detach()))
            for k in known:
                if virtual is None or k == c:
                    continue
                for v in range(virtual.shape[1]):
                    mu_v = virtual[k, v].double()
                    s_v = torch.zeros_like(mu_v) if virtual_var is None else virtual_var[k, v].double()
                    scores.append(score(*anchor, mu_v, s_v))
            losses.append(-torch.log_softmax(torch.stack(scores) / tau, 0)[0])
        if losses:
            total = total + torch.stack(losses).mean()
    return total / max(len(present), 1)
