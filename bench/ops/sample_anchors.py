"""Anchors: two passes over the masks and one draw per anchor."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.ops import baselines
from bench.ops.case import CONTRAST_SIZES, Case, Options, Sizes, Work
from bench.ops.inputs import batches
from bench.ops.sampler import PHILOX_INSTRUCTIONS, sampler_case
from prcl_fast.ops import sample_anchors
from prcl_fast.reference.class_lists import class_lists
from prcl_fast.reference.sample_anchors import sample_anchors as reference


def work(sizes: Sizes) -> Work:
    draws = sizes.classes * sizes.anchors
    return Work(3 * sizes.pixels + 8 * draws, instructions=PHILOX_INSTRUCTIONS * draws)


def cases(options: Options) -> list[Case]:
    sizes = CONTRAST_SIZES[options.device][options.size]
    inputs = [(x.label, x.valid, x.hard, x.seed) for x in batches(sizes, options)]
    shape = sizes.classes, sizes.anchors

    def public(label: Tensor, valid: Tensor, hard: Tensor, seed: Tensor) -> Tensor:
        return sample_anchors(label, valid, hard, *shape, seed)

    def plain(label: Tensor, valid: Tensor, hard: Tensor, seed: Tensor) -> Tensor:
        _, _, order, start = class_lists(label, valid, hard, sizes.classes)
        return reference(order, start, sizes.anchors, seed)

    def loop(label: Tensor, valid: Tensor, hard: Tensor, seed: Tensor) -> Tensor:
        return baselines.loop_anchors(label, hard, *shape)

    def allowed(index: Tensor) -> Tensor:
        label, _, hard, _ = (x.flatten() for x in inputs[0])
        own = torch.arange(sizes.classes, device=index.device)[:, None]
        return (label[index] == own) & hard[index]

    return [
        sampler_case(
            "sample_anchors",
            options,
            inputs,
            shape=str(sizes),
            dtype=torch.float32,
            public=public,
            plain=plain,
            loop=loop,
            allowed=allowed,
            work=work(sizes),
            check="of pixels that are not the class's",
        )
    ]
