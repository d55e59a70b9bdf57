"""The whole contrast: statistics, classes of the negatives, all draws, loss and gradients.

The eager candidate is the package on its torch backend. The compiled one is plain PyTorch with the package's
draws. The loop has its own draws, so its loss agrees only up to sampling noise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.ops import (
    baselines,
    eager,
    probabilistic_info_nce,
    prototype_statistics,
    sample_anchors,
    sample_negatives,
)
from bench.ops.case import (
    COMPILED_BACKENDS,
    CONTRAST_SIZES,
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
from bench.ops.inputs import DELTA_S, Batch, batches
from bench.ops.probabilistic_info_nce import ANCHORS_PER_SET, SHARED
from prcl_fast.losses import ProbabilisticContrast
from prcl_fast.ops import use_backend

VIRTUAL_NEGATIVES = (0, 4)  # per class
# Prototypes in float32 round differently from float64, which may change the class of a drawn negative.
_LOSS_BOUND = 1e-4
_LEAST_GRADIENT_BOUND = 1e-2


def cases(options: Options) -> list[Case]:
    sizes = CONTRAST_SIZES[options.device][options.size]
    sets = batches(sizes, options)
    inputs: list[tuple[Tensor, ...]] = [
        (x.mu.requires_grad_(), x.var.requires_grad_(), x.label, x.valid, x.confidence, x.seed) for x in sets
    ]
    return [_case(virtual, sizes, options, sets[0], inputs) for virtual in VIRTUAL_NEGATIVES]


def _case(
    virtual: int, sizes: Sizes, options: Options, batch: Batch, inputs: list[tuple[Tensor, ...]]
) -> Case:
    amounts = sizes.classes, sizes.anchors, sizes.negatives, virtual
    settings: dict[str, Any] = {"prototype": "local", "virtual_negatives": virtual}
    own = _first_step(contrast_module(sizes, options.device, **settings))
    shared = _first_step(contrast_module(sizes, options.device, anchors_per_set=ANCHORS_PER_SET, **settings))

    def loop(mu: Tensor, var: Tensor, *others: Tensor) -> Tensor:
        label, valid, confidence, _ = others
        return baselines.loop_contrast(mu, var, label, valid, confidence, *amounts)

    def plain(mu: Tensor, var: Tensor, *others: Tensor) -> Tensor:
        label, valid, confidence, seed = others
        return eager.eager_contrast(mu, var, label, valid, confidence, seed, *amounts)

    candidates = {
        "loop": Candidate(loop, needs=probabilistic_info_nce.loop_bytes(sizes), note="draws of its own"),
        "eager": Candidate(own, "torch", note="the torch backend"),
        "compile": compiled(plain),
    }
    for name in COMPILED_BACKENDS:
        # Not every backend that runs the statistics runs the loss, and vice versa.
        ops = ("prototype_statistics", "sample_anchors", "sample_negatives", "probabilistic_info_nce")
        found = [backends(op, own, options, dtype=options.dtype, names=(name,))[name] for op in ops]
        candidate = next((x for x in found if x.reason is not None), found[0])
        candidates[name] = candidate
        candidates[name + SHARED] = replace(
            candidate, function=shared, work=_work(sizes, options.dtype, batch, ANCHORS_PER_SET)
        )

    @functools.cache
    def exact(is_shared: bool) -> Outcome:
        mu, var = (x.detach().double().requires_grad_() for x in inputs[0][:2])
        with use_backend("torch"), torch.enable_grad():
            loss = (shared if is_shared else own)(mu, var, *inputs[0][2:])
            return Outcome((loss.detach(),), torch.autograd.grad(loss, (mu, var)))

    def errors(name: str, outcome: Outcome) -> dict[str, float]:
        expected = exact(name.endswith(SHARED))
        loss_error = relative_error(outcome.outputs, expected.outputs)
        if name == "loop":
            return {"forward": loss_error}
        return {"forward": loss_error, "backward": relative_error(outcome.gradients, expected.gradients)}

    return Case(
        variant=f"virtual={virtual}",
        shape=str(sizes),
        inputs=inputs,
        candidates=candidates,
        work=_work(sizes, options.dtype, batch, 1),
        errors=errors,
        bounds={
            "forward": _LOSS_BOUND,
            "backward": max(_LEAST_GRADIENT_BOUND, GRADIENT_BOUND[options.dtype]),
        },
        check="loss and gradients with the same seed; loop: its loss, of other draws",
        leaves=(0, 1),
    )


def _first_step(module: ProbabilisticContrast) -> Callable[..., Tensor]:
    """The module, with its state zeroed before each call, so that virtual negatives are always the same."""

    def call(*arguments: Tensor) -> Tensor:
        for buffer in module.buffers():
            buffer.zero_()
        loss: Tensor = module(*arguments)
        return loss

    return call


def contrast_module(sizes: Sizes, device: str, **arguments: Any) -> ProbabilisticContrast:
    """The module with the benchmarks' settings and further `arguments`."""
    settings = baselines.SETTINGS
    return ProbabilisticContrast(
        sizes.classes,
        sizes.dim,
        tau=settings.tau,
        anchors=sizes.anchors,
        negatives=sizes.negatives,
        delta_s=DELTA_S,
        reduction=settings.reduction,
        normalize=settings.normalize,
        beta=settings.beta,
        **arguments,
    ).to(device)


def _work(sizes: Sizes, dtype: torch.dtype, batch: Batch, anchors_per_set: int) -> dict[str, Work]:
    """The sum of the parts; virtual negatives are too few to matter."""
    loss = probabilistic_info_nce.work(sizes, dtype, anchors_per_set)
    forward = (
        prototype_statistics.work(sizes, batch)
        + sample_anchors.work(sizes)
        + sample_negatives.work(sizes, sizes.anchors // anchors_per_set)
        + loss["forward"]
    )
    return {"forward": forward, "backward": loss["backward"]}
