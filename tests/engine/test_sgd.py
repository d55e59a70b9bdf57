"""The optimiser's step equals PyTorch's for every memory format of weights, gradients and momentum."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prcl_fast.engine.sgd import FusedSGD

SIZES = ((6, 5, 3, 3), (7, 4, 1, 1), (5, 3), (4,))
SETTINGS: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.01}


def weights(memory_format: torch.memory_format) -> list[nn.Parameter]:
    torch.manual_seed(0)
    found = [nn.Parameter(torch.randn(size)) for size in SIZES]
    for parameter in found:
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)
    return found


def ours(parameters: list[nn.Parameter]) -> FusedSGD:
    groups = [{"params": parameters[:2], "lr": torch.tensor(0.1)}, {"params": parameters[2:], "lr": 0.02}]
    return FusedSGD(groups, **SETTINGS)


def pytorchs(parameters: list[nn.Parameter]) -> torch.optim.SGD:
    groups = [{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:], "lr": 0.02}]
    return torch.optim.SGD(groups, **SETTINGS, foreach=False)


def gradients(step: int, memory_format: torch.memory_format) -> list[Tensor]:
    draw = torch.Generator().manual_seed(step)
    found = [torch.randn(size, generator=draw) for size in SIZES]
    return [x.contiguous(memory_format=memory_format) if x.dim() == 4 else x for x in found]


@pytest.mark.parametrize("of_gradients", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("of_weights", [torch.channels_last, torch.contiguous_format])
def test_steps_are_those_of_pytorch(
    of_weights: torch.memory_format, of_gradients: torch.memory_format
) -> None:
    own, expected = weights(of_weights), weights(torch.contiguous_format)
    optimizers = ours(own), pytorchs(expected)
    for step in range(4):
        for parameters in (own, expected):
            for parameter, gradient in zip(parameters, gradients(step, of_gradients), strict=True):
                parameter.grad = gradient.clone()
        if step == 2:
            own[1].grad = expected[1].grad = None  # a head that was left out
        for optimizer in optimizers:
            optimizer.step()
    for parameter, other in zip(own, expected, strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-7)
        momentum = [
            o.state[p]["momentum_buffer"] for o, p in zip(optimizers, (parameter, other), strict=True)
        ]
        torch.testing.assert_close(*momentum, rtol=1e-6, atol=1e-7)
        assert parameter.stride() == momentum[0].stride()


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    parameters = weights(torch.channels_last)
    optimizer = ours(parameters)
    before = copy.deepcopy([parameter.detach() for parameter in parameters])
    for parameter, gradient in zip(parameters, gradients(0, torch.channels_last), strict=True):
        parameter.grad = gradient * torch.nan
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    assert all(torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))
    assert not any(optimizer.state[parameter]["momentum_buffer"].any() for parameter in parameters)


def test_a_scaled_gradient_is_made_smaller_by_the_scaler() -> None:
    own, expected = weights(torch.channels_last), weights(torch.channels_last)
    optimizer, other = ours(own), pytorchs(expected)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for parameter, plain, gradient in zip(own, expected, gradients(0, torch.channels_last), strict=True):
        parameter.grad, plain.grad = gradient * 1024, gradient.clone()
    scaler.scale(torch.zeros(()))  # makes the scale
    scaler.step(optimizer)
    scaler.update()
    other.step()
    for parameter, plain in zip(own, expected, strict=True):
        torch.testing.assert_close(parameter, plain, rtol=1e-6, atol=1e-7)


def test_its_state_is_that_of_pytorchs_optimizer() -> None:
    own, expected = weights(torch.channels_last), weights(torch.channels_last)
    optimizer, other = ours(own), pytorchs(expected)
    for parameter, gradient in zip(expected, gradients(0, torch.channels_last), strict=True):
        parameter.grad = gradient
    other.step()
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    with torch.no_grad():
        for parameter, plain in zip(own, expected, strict=True):
            parameter.copy_(plain)
            parameter.grad = plain.grad.clone()  # type: ignore[union-attr]
    optimizer.step()
    other.step()
    for parameter, plain in zip(own, expected, strict=True):
        torch.testing.assert_close(parameter, plain, rtol=1e-6, atol=1e-7)
