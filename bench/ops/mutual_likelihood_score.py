"""Mutual likelihood score: a dense block of pairs, and anchors against prototypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.ops import baselines
from bench.ops.case import (
    EXACT_BOUND,
    GRADIENT_BOUND,
    Candidate,
    Case,
    Options,
    Outcome,
    Work,
    backends,
    compiled,
    relative_error,
)
from prcl_fast.ops import mutual_likelihood_score

# (M, N, D)
SIZES = {
    "cpu": {"small": (128, 128, 64), "voc": (1024, 1024, 256), "cityscapes": (4864, 19, 256)},
    "cuda": {"small": (128, 128, 64), "voc": (4096, 4096, 256), "cityscapes": (4864, 19, 256)},
}
_SETTINGS = baselines.Settings(reduction="sum", normalize=False)  # the op's defaults
_CHECKED_ROWS = 64
_BROADCAST_TENSORS = 12  # [M, N, D] float32 tensors that plain PyTorch holds at its peak
# Of one pair and dimension. Two dimensions share one division and one logarithm of the product.
_FORWARD = {"instructions": 5, "special": 0.75}
_BACKWARD = {"instructions": 8, "special": 1}


def eager(mu_a: Tensor, var_a: Tensor, mu_b: Tensor, var_b: Tensor) -> Tensor:
    mu_a, var_a, mu_b, var_b = (x.float() for x in (mu_a, var_a, mu_b, var_b))
    return baselines.score(mu_a[:, None], var_a[:, None], mu_b, var_b, _SETTINGS)


def cases(options: Options) -> list[Case]:
    m, n, dim = SIZES[options.device][options.size]
    generator = torch.Generator(options.device).manual_seed(0)
    place: dict[str, Any] = {"device": options.device, "generator": generator}
    inputs = []
    for _ in range(options.input_sets):
        values = []
        for rows in (m, n):
            values += [torch.randn(rows, dim, **place), 0.05 + 0.9 * torch.rand(rows, dim, **place)]
        inputs.append(tuple(value.to(options.dtype).requires_grad_() for value in values))
    upstream = torch.randn(m, n, **place)

    needs = _BROADCAST_TENSORS * 4 * m * n * dim
    candidates = {
        "eager": Candidate(eager, needs=needs),
        "compile": compiled(eager),
    }
    candidates |= backends("mutual_likelihood_score", mutual_likelihood_score, options, dtype=torch.float32)
    candidates["torch"] = Candidate(mutual_likelihood_score, "torch", needs=needs)

    pairs, rows_bytes = m * n * dim, 2 * (m + n) * dim * options.dtype.itemsize
    work = {
        "forward": Work(rows_bytes + 4 * m * n, **{k: v * pairs for k, v in _FORWARD.items()}),
        "backward": Work(2 * rows_bytes + 4 * m * n, **{k: v * pairs for k, v in _BACKWARD.items()}),
    }
    return [
        Case(
            shape=f"M={m} N={n} D={dim}",
            inputs=inputs,
            candidates=candidates,
            work=work,
            errors=_Errors(inputs[0], upstream),
            bounds={"forward": EXACT_BOUND, "backward": GRADIENT_BOUND[options.dtype]},
            check=f"scores and gradients of {_CHECKED_ROWS} rows of each side",
            leaves=(0, 1, 2, 3),
            upstream=upstream,
        )
    ]


class _Errors:
    """Errors of some rows of both sides to float64; all rows would need a [M, N, D] tensor."""

    def __init__(self, inputs: tuple[Tensor, ...], upstream: Tensor) -> None:
        self._inputs, self._upstream = [x.detach() for x in inputs], upstream
        self._expected: tuple[list[Tensor], list[Tensor]] | None = None
        m, n = upstream.shape
        self._rows = [
            torch.linspace(0, size - 1, min(size, _CHECKED_ROWS), device=upstream.device).long()
            for size in (m, n)
        ]

    def __call__(self, name: str, outcome: Outcome) -> dict[str, float]:
        if self._expected is None:
            self._expected = self._exact()
        scores, gradients = self._expected
        a, b = self._rows
        found = outcome.outputs[0]
        slopes = [slope[rows] for slope, rows in zip(outcome.gradients, (a, a, b, b), strict=True)]
        return {
            "forward": relative_error([found[a], found[:, b]], scores),
            "backward": relative_error(slopes, gradients),
        }

    def _exact(self) -> tuple[list[Tensor], list[Tensor]]:
        a, b = self._rows
        scores: list[Tensor] = []
        gradients: list[Tensor] = []
        for side, rows in (("a", a), ("b", b)):
            values = [x.double() for x in self._inputs]
            own = slice(0, 2) if side == "a" else slice(2, 4)
            values[own] = [x[rows].requires_grad_() for x in values[own]]
            mu_a, var_a, mu_b, var_b = values
            found = baselines.score(mu_a[:, None], var_a[:, None], mu_b, var_b, _SETTINGS)
            weight = self._upstream[rows] if side == "a" else self._upstream[:, rows]
            scores.append(found.detach())
            gradients += torch.autograd.grad(found, values[own], weight.double())
        return scores, gradients
