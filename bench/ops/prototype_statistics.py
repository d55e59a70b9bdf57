"""Prototype statistics: one pass over the features of a batch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from bench.ops import eager
from bench.ops.case import (
    CONTRAST_SIZES,
    EXACT_BOUND,
    Candidate,
    Case,
    Options,
    Outcome,
    Sizes,
    Work,
    backends,
    compiled,
    relative_error,
)
from bench.ops.inputs import Batch, batches
from prcl_fast.ops import prototype_statistics
from prcl_fast.reference.prototype_statistics import prototype_statistics as reference


def work(sizes: Sizes, batch: Batch) -> Work:
    """Each row that counts once, and the masks; per number a reciprocal, a product and two additions."""
    counted = int((batch.valid & (batch.label < sizes.classes)).sum()) * sizes.dim
    read = 2 * counted * batch.mu.dtype.itemsize + 2 * sizes.pixels
    return Work(read + 8 * sizes.classes * sizes.dim, instructions=4 * counted, special=counted)


def cases(options: Options) -> list[Case]:
    sizes = CONTRAST_SIZES[options.device][options.size]
    sets = batches(sizes, options)
    inputs = [(x.mu, x.var, x.label, x.valid) for x in sets]
    num_classes = sizes.classes

    def public(mu: Tensor, var: Tensor, label: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        found = prototype_statistics(mu, var, label, valid, num_classes)
        return found.precision, found.weighted_mean, found.count

    def plain(mu: Tensor, var: Tensor, label: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        return eager.eager_statistics(mu, var, label, valid, num_classes)

    candidates = {
        "eager": Candidate(plain),
        "compile": compiled(plain),
    }
    candidates |= backends("prototype_statistics", public, options, dtype=options.dtype)

    @functools.cache
    def exact() -> tuple[Tensor, ...]:
        mu, var, label, valid = inputs[0]
        return reference(mu.double(), var.double(), label, valid, num_classes, False, None, None)

    def errors(name: str, outcome: Outcome) -> dict[str, float]:
        *sums, count = outcome.outputs
        if not torch.equal(count.long(), exact()[2]):
            return {"forward": float("inf")}
        return {"forward": relative_error(sums, exact()[:2])}

    return [
        Case(
            shape=str(sizes),
            inputs=inputs,
            candidates=candidates,
            work={"forward": work(sizes, sets[0])},
            errors=errors,
            bounds={"forward": EXACT_BOUND},
            check="both sums; counts must be equal",
        )
    ]
