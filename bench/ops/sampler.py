"""The case of a sampler of pixel indices, whose backends must draw what the reference draws."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.ops.case import COMPILED_BACKENDS, Candidate, Case, Options, Outcome, Work, backends, compiled

PHILOX_INSTRUCTIONS = 100  # ten rounds of two wide products, four exclusive ors and two additions


def sampler_case(
    op: str,
    options: Options,
    inputs: Sequence[tuple[Any, ...]],
    *,
    shape: str,
    dtype: torch.dtype,
    public: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    loop: Callable[..., Tensor],
    allowed: Callable[[Tensor], Tensor],
    work: Work,
    check: str,
) -> Case:
    """The case of one sampler.

    Args:
        dtype: decides which kernels exist.
        public: the op.
        plain: the reference.
        loop: the published sampler, which draws otherwise.
        allowed: (indices) -> bool, whether the loop may draw the pixel.
        check: of the loop's indices, in a few words.
    """
    candidates = {
        "loop": Candidate(loop, graph=False, note="draws of its own"),
        "eager": Candidate(plain, note="the reference"),
        "compile": compiled(plain),
    }
    # The torch backend is the eager candidate.
    candidates |= backends(op, public, options, dtype=dtype, names=COMPILED_BACKENDS)

    @functools.cache
    def expected() -> Tensor:
        return plain(*inputs[0])

    def errors(name: str, outcome: Outcome) -> dict[str, float]:
        index = outcome.outputs[0]
        wrong = (index >= 0) & ~allowed(index) if name == "loop" else index != expected()
        return {"forward": float(wrong.double().mean())}

    return Case(
        shape=shape,
        inputs=inputs,
        candidates=candidates,
        work={"forward": work},
        errors=errors,
        bounds={"forward": 0.0},
        check=f"share of indices that differ from the reference's; loop: {check}",
    )
