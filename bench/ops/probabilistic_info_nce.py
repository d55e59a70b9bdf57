"""Probabilistic InfoNCE on given draws: loss, and gradients to the features."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.machine import fits
from bench.ops import baselines, eager
from bench.ops.case import (
    COMPILED_BACKENDS,
    CONTRAST_SIZES,
    EXACT_BOUND,
    GRADIENT_BOUND,
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
from bench.ops.sample_negatives import class_probability
from prcl_fast.ops import PrototypeStatistics, probabilistic_info_nce, use_backend
from prcl_fast.reference.class_lists import class_lists
from prcl_fast.reference.prototype_statistics import prototype_statistics
from prcl_fast.reference.sample_anchors import sample_anchors
from prcl_fast.reference.sample_negatives import sample_negatives

ANCHORS_PER_SET = 16
SHARED = f"-shared{ANCHORS_PER_SET}"
# [C, A, N, D] float32 tensors that autograd holds at its peak.
_EAGER_TENSORS, _LOOP_TENSORS = 13, 5
# Of one anchor, negative and dimension: difference, sum, product, loss and two gradients; a reciprocal, and
# the logarithm of a product of four.
_PAIR = {"instructions": 9, "special": 1.25}


def loop_bytes(sizes: Sizes) -> int:
    """Bytes that autograd saves in the loop over classes."""
    return _LOOP_TENSORS * _broadcast_bytes(sizes)


def work(sizes: Sizes, dtype: torch.dtype, anchors_per_set: int = 1) -> dict[str, Work]:
    """Forward makes the anchors' gradients too; backward writes two of the features' size, almost all zero.

    Negatives are gathered once for the `anchors_per_set` anchors that use them.
    """
    rows = sizes.classes * sizes.anchors * (sizes.negatives // anchors_per_set + 1)
    pairs = sizes.classes * sizes.anchors * (sizes.negatives + 1) * sizes.dim
    gathered = 2 * rows * sizes.dim * dtype.itemsize
    at_anchors = 8 * sizes.classes * sizes.anchors * sizes.dim
    return {
        "forward": Work(at_anchors, gathered, **{key: value * pairs for key, value in _PAIR.items()}),
        "backward": Work(at_anchors + 2 * sizes.pixels * sizes.dim * dtype.itemsize),
    }


def cases(options: Options) -> list[Case]:
    sizes = CONTRAST_SIZES[options.device][options.size]
    inputs = [_inputs(batch, sizes) for batch in batches(sizes, options)]

    def loop(mu: Tensor, var: Tensor, anchors: Tensor, own: Tensor, shared: Tensor, positive: Any) -> Tensor:
        return baselines.loop_loss(mu, var, anchors, own, positive.mean, positive.variance, None)

    def plain(mu: Tensor, var: Tensor, anchors: Tensor, own: Tensor, shared: Tensor, positive: Any) -> Tensor:
        return eager.eager_loss(mu, var, anchors, own, positive, None)

    needs = _EAGER_TENSORS * _broadcast_bytes(sizes)
    eager_candidate = Candidate(plain)
    if not fits(needs, options.device):
        note = f"the torch backend: autograd needs {needs / 1e9:.0f} GB"
        eager_candidate = Candidate(_with_own, "torch", note=note)
    candidates = {
        "loop": Candidate(loop, needs=loop_bytes(sizes)),
        "eager": eager_candidate,
        "compile": compiled(plain),
    }
    op = "probabilistic_info_nce"
    candidates |= backends(op, _with_own, options, dtype=options.dtype)
    shared_work = work(sizes, options.dtype, ANCHORS_PER_SET)
    shared = backends(op, _with_shared, options, dtype=options.dtype, names=COMPILED_BACKENDS)
    for name, candidate in shared.items():
        candidates[name + SHARED] = replace(candidate, work=shared_work)

    @functools.cache
    def exact(is_shared: bool) -> Outcome:
        mu, var = (x.detach().double().requires_grad_() for x in inputs[0][:2])
        with use_backend("torch"), torch.enable_grad():
            loss = (_with_shared if is_shared else _with_own)(mu, var, *inputs[0][2:])
            return Outcome((loss.detach(),), torch.autograd.grad(loss, (mu, var)))

    def errors(name: str, outcome: Outcome) -> dict[str, float]:
        expected = exact(name.endswith(SHARED))
        return {
            "forward": relative_error(outcome.outputs, expected.outputs),
            "backward": relative_error(outcome.gradients, expected.gradients),
        }

    return [
        Case(
            shape=str(sizes),
            inputs=inputs,
            candidates=candidates,
            work=work(sizes, options.dtype),
            errors=errors,
            bounds={"forward": EXACT_BOUND, "backward": GRADIENT_BOUND[options.dtype]},
            check="loss and gradients on the same draws",
            leaves=(0, 1),
        )
    ]


def _broadcast_bytes(sizes: Sizes) -> int:
    return 4 * sizes.classes * sizes.anchors * sizes.negatives * sizes.dim


def _inputs(batch: Batch, sizes: Sizes) -> tuple[Any, ...]:
    """mu, var, anchors [C, A], negatives [C, A, N] and [C, A / ANCHORS_PER_SET, N], positive."""
    num_classes = sizes.classes
    *sums, _ = prototype_statistics(
        batch.mu, batch.var, batch.label, batch.valid, num_classes, False, None, None
    )
    *of_valid, hard_order, hard_start = class_lists(batch.label, batch.valid, batch.hard, num_classes)
    anchors = sample_anchors(hard_order, hard_start, sizes.anchors, batch.seed)
    probability = class_probability(batch, num_classes)
    negatives = sample_negatives(probability, *of_valid, sizes.anchors, sizes.negatives, batch.seed)
    shared = negatives[:, ::ANCHORS_PER_SET].contiguous()
    features = batch.mu.requires_grad_(), batch.var.requires_grad_()
    return *features, anchors, negatives, shared, PrototypeStatistics(*sums)


def _with_own(
    mu: Tensor, var: Tensor, anchors: Tensor, own: Tensor, shared: Tensor, positive: PrototypeStatistics
) -> Tensor:
    return _public(mu, var, anchors, own, positive)


def _with_shared(
    mu: Tensor, var: Tensor, anchors: Tensor, own: Tensor, shared: Tensor, positive: PrototypeStatistics
) -> Tensor:
    return _public(mu, var, anchors, shared, positive)


def _public(
    mu: Tensor, var: Tensor, anchors: Tensor, negatives: Tensor, positive: PrototypeStatistics
) -> Tensor:
    settings = baselines.SETTINGS
    return probabilistic_info_nce(
        mu,
        var,
        anchors,
        negatives,
        positive,
        None,
        tau=settings.tau,
        reduction=settings.reduction,
        normalize=settings.normalize,
    )
