"""Cross-entropy at image size from logits at feature size, and its gradient."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.ops.case import (
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
from bench.ops.inputs import labels
from prcl_fast.ops import upsample_cross_entropy

# (B, C, h, w, H, W)
SIZES = {
    "cpu": {
        "small": (2, 6, 33, 33, 129, 129),
        "voc": (4, 21, 129, 129, 513, 513),
        "cityscapes": (2, 19, 193, 193, 769, 769),
    },
    "cuda": {
        "small": (2, 6, 33, 33, 129, 129),
        "voc": (32, 21, 128, 128, 512, 512),
        "cityscapes": (32, 19, 192, 192, 768, 768),
    },
}
# Of one pixel and class: interpolation, maximum, exponent and sum; probability less target, its weight, the
# transposed interpolation. The forward pass can do all of it; the backward pass only scales the gradient.
_INSTRUCTIONS, _SPECIAL = 10, 1


def cases(options: Options) -> list[Case]:
    batch, classes, height, width, *size = SIZES[options.device][options.size]
    device = torch.Generator(options.device).manual_seed(0)
    host = torch.Generator().manual_seed(0)
    inputs = []
    for _ in range(options.input_sets):
        shape = (batch, classes, height, width)
        logits = 3.0 * torch.randn(shape, device=options.device, generator=device)
        target = labels(Sizes(batch, size[0], size[1], 0, classes, 0, 0), options.labels, host)
        inputs.append((logits.to(options.dtype).requires_grad_(), target.to(options.device)))

    def plain(logits: Tensor, target: Tensor) -> Tensor:
        full = F.interpolate(logits.float(), size, mode="bilinear", align_corners=True)
        return F.cross_entropy(full, target.long(), ignore_index=255)

    candidates = {"eager": Candidate(plain), "compile": compiled(plain)}
    candidates |= backends("upsample_cross_entropy", upsample_cross_entropy, options, dtype=options.dtype)

    logits, target = inputs[0]
    terms = target.numel() * classes
    work = {
        "forward": Work(2 * logits.nbytes + target.nbytes, 0, _INSTRUCTIONS * terms, _SPECIAL * terms),
        "backward": Work(2 * logits.nbytes),
    }

    @functools.cache
    def exact() -> tuple[Tensor, Tensor]:
        kept = (target != 255).sum()
        loss, gradient = torch.zeros_like(kept, dtype=torch.float64), []
        for image, label in zip(logits.detach().double(), target.long(), strict=True):
            leaf = image[None].requires_grad_()
            with torch.enable_grad():
                full = F.interpolate(leaf, size, mode="bilinear", align_corners=True)
                part = F.cross_entropy(full, label[None], ignore_index=255, reduction="sum") / kept
            gradient.append(torch.autograd.grad(part, leaf)[0])
            loss += part.detach()
        return loss, torch.cat(gradient)

    def errors(name: str, outcome: Outcome) -> dict[str, float]:
        loss, gradient = exact()
        return {
            "forward": relative_error(outcome.outputs, [loss]),
            "backward": relative_error(outcome.gradients, [gradient]),
        }

    return [
        Case(
            shape=f"B={batch} C={classes} {height}x{width} -> {size[0]}x{size[1]}",
            inputs=inputs,
            candidates=candidates,
            work=work,
            errors=errors,
            bounds={"forward": EXACT_BOUND, "backward": GRADIENT_BOUND[options.dtype]},
            check="loss and gradient",
            leaves=(0,),
        )
    ]
