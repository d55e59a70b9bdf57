"""Pseudo-labels: class and confidence at image size from logits at feature size."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.ops.case import (
    EXACT_BOUND,
    Candidate,
    Case,
    Options,
    Outcome,
    Work,
    backends,
    compiled,
    relative_error,
)
from prcl_fast.ops import pseudo_label

# (B, C, h, w, H, W)
SIZES = {
    "cpu": {
        "small": (2, 6, 33, 33, 129, 129),
        "voc": (4, 21, 129, 129, 513, 513),
        "cityscapes": (2, 19, 193, 193, 769, 769),
    },
    "cuda": {
        "small": (2, 6, 33, 33, 129, 129),
        "voc": (16, 21, 128, 128, 512, 512),
        "cityscapes": (16, 19, 192, 192, 768, 768),
    },
}
_MARGIN = 1e-5  # labels are compared where the best two probabilities are further apart
# Of one pixel and class: interpolation, maximum and its class, exponent and sum; the exponential.
_INSTRUCTIONS, _SPECIAL = 6, 1


def cases(options: Options) -> list[Case]:
    batch, classes, height, width, *size = SIZES[options.device][options.size]
    generator = torch.Generator(options.device).manual_seed(0)
    inputs = [
        (_logits((batch, classes, height, width), options, generator),) for _ in range(options.input_sets)
    ]

    def plain(logits: Tensor) -> tuple[Tensor, Tensor]:
        full = F.interpolate(logits.float(), size, mode="bilinear", align_corners=True)
        confidence, label = torch.softmax(full, dim=1).max(dim=1)
        return label.to(torch.uint8), confidence

    def public(logits: Tensor) -> tuple[Tensor, Tensor]:
        return pseudo_label(logits, size)

    candidates = {"eager": Candidate(plain), "compile": compiled(plain)}
    candidates |= backends("pseudo_label", public, options, dtype=options.dtype)

    pixels = batch * size[0] * size[1]
    read = inputs[0][0].nbytes
    work = Work(read + 5 * pixels, 0, _INSTRUCTIONS * pixels * classes, _SPECIAL * pixels * classes)

    @functools.cache
    def exact() -> tuple[Tensor, Tensor, Tensor]:
        """Label, confidence, and whether the margin of the label is sufficient."""
        found = []
        for image in inputs[0][0].double():
            full = F.interpolate(image[None], size, mode="bilinear", align_corners=True)
            best, label = torch.softmax(full, dim=1)[0].topk(2, dim=0)
            found.append((label[0], best[0], best[0] - best[1] > _MARGIN))
        labels, confidences, sure = zip(*found, strict=True)
        return torch.stack(labels), torch.stack(confidences), torch.stack(sure)

    def errors(name: str, outcome: Outcome) -> dict[str, float]:
        label, confidence, sure = exact()
        wrong = ((outcome.outputs[0] != label) & sure).double().mean().item()
        return {"forward": max(wrong, relative_error(outcome.outputs[1:2], [confidence]))}

    return [
        Case(
            shape=f"B={batch} C={classes} {height}x{width} -> {size[0]}x{size[1]}",
            inputs=inputs,
            candidates=candidates,
            work={"forward": work},
            errors=errors,
            bounds={"forward": EXACT_BOUND},
            check=f"confidence, and share of wrong labels where the margin exceeds {_MARGIN:g}",
        )
    ]


def _logits(shape: tuple[int, ...], options: Options, generator: torch.Generator) -> Tensor:
    return 3.0 * torch.randn(shape, device=options.device, generator=generator).to(options.dtype)
