"""Anchors: two passes over the masks and one draw per anchor."""

from __future__ import annotations

import functools

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
from bench.ops.inputs import batches
from prcl_fast.ops import sample_anchors
from prcl_fast.reference.class_lists import class_lists
from prcl_fast.reference.sample_anchors import sample_anchors as reference

PHILOX_INSTRUCTIONS = 100  # ten rounds of two wide products, four exclusive ors and two additions


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

    candidates = {
        "loop": Candidate(loop, graph=False, note="draws of its own"),
        "eager": Candidate(plain, note="the reference"),
        "compile": compiled(plain),
    }
    # The torch backend is what eager is.
    candidates |= backends("sample_anchors", public, options, dtype=torch.float32, names=COMPILED_BACKENDS)

    @functools.cache
    def expected() -> Tensor:
        return plain(*inputs[0])

    def errors(name: str, outcome: Outcome) -> dict[str, float]:
        index = outcome.outputs[0]
        if name != "loop":
            return {"forward": float((index != expected()).double().mean())}
        label, _, hard, _ = (x.flatten() for x in inputs[0])
        own = torch.arange(shape[0], device=index.device)[:, None]
        wrong = (index >= 0) & ~((label[index] == own) & hard[index])
        return {"forward": float(wrong.double().mean())}

    return [
        Case(
            shape=str(sizes),
            inputs=inputs,
            candidates=candidates,
            work={"forward": work(sizes)},
            errors=errors,
            bounds={"forward": 0.0},
            check="share of other indices than the reference's; loop: of pixels that are not the class's",
        )
    ]
