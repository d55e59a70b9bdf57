"""The probability head's tail in training: batch norm, gain, bias and floored sigmoid, and its gradients."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.ops.case import (
    CONTRAST_SIZES,
    EXACT_BOUND,
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
from bench.step.plain_network import LOG_FLOOR, variance
from prcl_fast.ops import variance_head

# Of one element: the moments' difference and two sums, then z, numerator, denominator and their quotient;
# backward, twice z and its gradient, two sums and the gradient of x. An exponential and a reciprocal each.
_FORWARD, _BACKWARD = 12, 22


def cases(options: Options) -> list[Case]:
    sizes = CONTRAST_SIZES[options.device][options.size]
    shape = (sizes.batch, sizes.height, sizes.width, sizes.dim)
    generator = torch.Generator(options.device).manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(shape, device=options.device, generator=generator).permute(0, 3, 1, 2)

    inputs = []
    for _ in range(options.input_sets):
        gain, bias = (torch.tensor([value], device=options.device) for value in (1.2, -0.3))
        running = torch.zeros(sizes.dim, device=options.device), torch.ones(sizes.dim, device=options.device)
        x = (2 * normal() + 1).to(options.dtype)
        inputs.append((x.requires_grad_(), gain.requires_grad_(), bias.requires_grad_(), *running))

    def plain(x: Tensor, gamma: Tensor, beta: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
        return variance(F.batch_norm(x.float(), running_mean, running_var, training=True), gamma, beta)

    candidates = {"eager": Candidate(plain), "compile": compiled(plain)}
    candidates |= backends(
        "variance_head", functools.partial(variance_head, training=True), options, dtype=options.dtype
    )
    upstream = normal()

    elements, read = sizes.pixels * sizes.dim, inputs[0][0].nbytes
    work = {
        "forward": Work(2 * read + 4 * elements, 0, _FORWARD * elements, 2 * elements),
        "backward": Work(3 * read + 8 * elements, 0, _BACKWARD * elements, 4 * elements),
    }

    @functools.cache
    def exact() -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = [value.detach().double().requires_grad_() for value in inputs[0][:3]]
        with torch.enable_grad():
            z = leaves[1] * F.batch_norm(leaves[0], None, None, training=True) + leaves[2]
            var = torch.sigmoid(torch.logaddexp(z, torch.full_like(z, LOG_FLOOR)))
        return var.detach(), torch.autograd.grad(var, leaves, upstream.double())

    def errors(name: str, outcome: Outcome) -> dict[str, float]:
        var, gradients = exact()
        return {
            "forward": relative_error(outcome.outputs, [var]),
            "backward": max(
                relative_error([value], [target])
                for value, target in zip(outcome.gradients, gradients, strict=True)
            ),
        }

    return [
        Case(
            shape=f"B={sizes.batch} {sizes.height}x{sizes.width} D={sizes.dim}",
            inputs=inputs,
            candidates=candidates,
            work=work,
            errors=errors,
            bounds={"forward": EXACT_BOUND, "backward": GRADIENT_BOUND[options.dtype]},
            check="variance, and gradients of x, gain and bias",
            leaves=(0, 1, 2),
            upstream=upstream,
        )
    ]
