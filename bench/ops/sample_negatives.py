"""Negatives: a class and one of its pixels for every anchor and negative."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bench.ops import baselines
from bench.ops.case import CONTRAST_SIZES, Case, Options, Sizes, Work
from bench.ops.inputs import Batch, batches
from bench.ops.sampler import PHILOX_INSTRUCTIONS, sampler_case
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

    def allowed(index: Tensor) -> Tensor:
        _, label, valid, _ = (x.flatten() for x in inputs[0])
        own = torch.arange(sizes.classes, device=index.device)[:, None, None]
        return valid[index] & (label[index] != own) & (label[index] < sizes.classes)

    return [
        sampler_case(
            "sample_negatives",
            options,
            inputs,
            shape=str(sizes),
            dtype=torch.float64,
            public=public,
            plain=plain,
            loop=loop,
            allowed=allowed,
            work=work(sizes, sizes.anchors),
            check="of pixels that no negative may be",
        )
    ]
