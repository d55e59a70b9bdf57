"""Mutual likelihood score: every backend that runs here, forward, and forward with backward.

python -m bench.mutual_likelihood_score [--device cuda] [--rounds 15]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench import harness
from prcl_fast.ops import mutual_likelihood_score, use_backend
from prcl_fast.ops._backend import BACKENDS, unavailable

# Prototypes against prototypes, anchors against prototypes, a dense block.
SHAPES = {"cpu": [(21, 21), (1024, 21), (512, 512)], "cuda": [(21, 21), (5376, 21), (4096, 4096)]}
DIMS = 256
MAX_BROADCAST_BYTES = 2 << 30  # the torch backend holds [M, N, D] several times over


def candidate(backend: str, operands: list[Tensor], backward: bool) -> Callable[[], object]:
    def run() -> object:
        with use_backend(backend):
            score = mutual_likelihood_score(*operands)
            return torch.autograd.grad(score.sum(), operands) if backward else score

    return run


def main() -> None:
    options = harness.arguments(__doc__ or "")
    rows = []
    for m, n in SHAPES[options.device]:
        operands = [
            value.requires_grad_()
            for rows_ in (m, n)
            for value in (
                torch.randn(rows_, DIMS, device=options.device),
                torch.rand(rows_, DIMS, device=options.device) * 0.98 + 0.01,
            )
        ]
        backends = [
            backend
            for backend in BACKENDS
            if unavailable("mutual_likelihood_score", backend, options.device) is None
            and (backend != "torch" or m * n * DIMS * 4 <= MAX_BROADCAST_BYTES)
        ]
        for backward in (False, True):
            candidates = {backend: candidate(backend, operands, backward) for backend in backends}
            labels = {"op": "mutual_likelihood_score", "m": m, "n": n, "d": DIMS, "backward": backward}
            rows += harness.compare(candidates, device=options.device, rounds=options.rounds, **labels)
    harness.write("mutual_likelihood_score", rows, options.device, options.output)


if __name__ == "__main__":
    main()
