"""Negatives: a class and one of its pixels for every anchor and negative."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from bench.ops import baselines
from bench.ops.case import (
    COMPILED_BACKENDS,
    CONTRAST_SIZES,
    Candidate,
    Case,
    Options,
    Outcome,
    Sizes,
    Work,
    backends,
    compiled,
)
from bench.ops.inputs import Batch, batches
from bench.ops.sample_anchors import PHILOX_INSTRUCTIONS
from prcl_fast.ops import sample_negatives
from prcl_fast.reference.class_lists import class_lists
from prcl_fast.reference.prototype_statistics import prototype_statistics
from prcl_fast.reference.sample_negatives import sample_negatives as reference


def work(sizes: Sizes, anchors: int) -> Work:
    """The masks, and an index of 8 bytes for each draw of `anchors` sets of negatives a class."""
    draws = sizes.classes * anchors * sizes.negatives
    return Work(2 * sizes.pixels + 8 * draws, instructions=PHILOX_INSTRUCTIONS * draws)


def class_probability(batch: Batch, num_classes: int) -> Tensor:
    """[C, C] float64, from the batch's own prototypes."""
    precision, weighted_mean, count, _ = prototype_statistics(
        batch.mu.detach(), batch.var.detach(), batch.label, batch.valid, num_classes, False, None, None
    )
    variance = torch.where(count[:, None] > 0, precision, 0.0).reciprocal()
    mean = torch.where(count[:, None] > 0, weighted_mean / precision, 0.0)
    return baselines.negative_classes(mean.double(), variance.double())


def cases(options: Options) -> list[Case]:
    sizes = CONTRAST_SIZES[options.device][options.size]
    inputs = [
        (class_probability(x, sizes.classes), x.label, x.valid, x.seed) for x in batches(sizes, options)
    ]
    amounts = sizes.anchors, sizes.negatives

    def public(probability: Tensor, label: Tensor, valid: Tensor, seed: Tensor) -> Tensor:
        return sample_negatives(probability, label, valid, sizes.classes, *amounts, seed)

    def plain(probability: Tensor, label: Tensor, valid: Tensor, seed: Tensor) -> Tensor:
        order, start, _, _ = class_lists(label, valid, valid, sizes.classes)
        return reference(probability, order, start, *amounts, seed)

    def loop(probability: Tensor, label: Tensor, valid: Tensor, seed: Tensor) -> Tensor:
        return baselines.loop_negatives(probability, label, valid, *amounts, np.random.default_rng(0))

    candidates = {
        "loop": Candidate(loop, graph=False, note="draws of its own"),
        "eager": Candidate(plain, note="the reference"),
        "compile": compiled(plain),
    }
    # The torch backend is what eager is.
    candidates |= backends("sample_negatives", public, options, dtype=torch.float64, names=COMPILED_BACKENDS)

    @functools.cache
    def expected() -> Tensor:
        return plain(*inputs[0])

    def errors(name: str, outcome: Outcome) -> dict[str, float]:
        index = outcome.outputs[0]
        if name != "loop":
            return {"forward": float((index != expected()).double().mean())}
        _, label, valid, _ = (x.flatten() for x in inputs[0])
        own = torch.arange(sizes.classes, device=index.device)[:, None, None]
        right = valid[index] & (label[index] != own) & (label[index] < sizes.classes)
        return {"forward": float(((index >= 0) & ~right).double().mean())}

    return [
        Case(
            shape=str(sizes),
            inputs=inputs,
            candidates=candidates,
            work={"forward": work(sizes, sizes.anchors)},
            errors=errors,
            bounds={"forward": 0.0},
            check="share of other indices than the reference's; loop: of pixels that no negative may be",
        )
    ]
