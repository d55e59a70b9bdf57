"""Bilinear upsampling inside the decoder, and its gradient."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.ops.case import (
    GRADIENT_BOUND,
    Candidate,
    Case,
    Options,
    Outcome,
    Work,
    backends,
    compiled,
    relative_error,
)
from prcl_fast.ops import upsample_bilinear

# (B, C, h, w, H, W): the decoder's at output stride 16, or 8 for cityscapes
SIZES = {
    "cpu": {
        "small": (2, 16, 9, 9, 33, 33),
        "voc": (4, 256, 33, 33, 129, 129),
        "cityscapes": (2, 256, 97, 97, 193, 193),
    },
    "cuda": {
        "small": (2, 16, 9, 9, 33, 33),
        "voc": (16, 256, 32, 32, 128, 128),
        "cityscapes": (16, 256, 96, 96, 192, 192),
    },
}
# Of one output: between two rows; between two columns once for each of the input rows around it.
_INSTRUCTIONS = 2


def cases(options: Options) -> list[Case]:
    batch, channels, height, width, *size = SIZES[options.device][options.size]
    generator = torch.Generator(options.device).manual_seed(0)

    def features(height: int, width: int) -> Tensor:
        values = torch.randn((batch, channels, height, width), device=options.device, generator=generator)
        return values.to(options.dtype).contiguous(memory_format=torch.channels_last)

    inputs = [(features(height, width).requires_grad_(),) for _ in range(options.input_sets)]
    upstream = features(*size)

    def plain(x: Tensor) -> Tensor:
        return F.interpolate(x, size, mode="bilinear", align_corners=True)

    def public(x: Tensor) -> Tensor:
        return upsample_bilinear(x, size)

    candidates = {"eager": Candidate(plain), "compile": compiled(plain)}
    candidates |= backends("upsample_bilinear", public, options, dtype=options.dtype)
    work = Work(inputs[0][0].nbytes + upstream.nbytes, 0, _INSTRUCTIONS * upstream.numel())

    @functools.cache
    def exact() -> tuple[Tensor, Tensor]:
        leaf = inputs[0][0].detach().double().requires_grad_()
        with torch.enable_grad():
            full = plain(leaf)
        return full.detach(), torch.autograd.grad(full, leaf, upstream.double())[0]

    def errors(name: str, outcome: Outcome) -> dict[str, float]:
        value, gradient = exact()
        return {
            "forward": relative_error(outcome.outputs, [value]),
            "backward": relative_error(outcome.gradients, [gradient]),
        }

    bound = GRADIENT_BOUND[options.dtype]  # the output is rounded to the features' dtype as well
    return [
        Case(
            shape=f"B={batch} C={channels} {height}x{width} -> {size[0]}x{size[1]}",
            inputs=inputs,
            candidates=candidates,
            work={"forward": work, "backward": work},
            errors=errors,
            bounds={"forward": bound, "backward": bound},
            check="value and gradient",
            leaves=(0,),
            upstream=upstream,
        )
    ]
