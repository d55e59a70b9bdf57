"""Weights cast together equal the weights that autocast casts one by one."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prcl_fast.models import network as network_module
from prcl_fast.models.network import SegmentationNetwork


def make_network() -> SegmentationNetwork:
    torch.manual_seed(0)
    network = SegmentationNetwork(
        "resnet18", base_width=8, num_classes=5, width=16, representation_dim=8, probability=True
    )
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def trained(network: SegmentationNetwork, dtype: torch.dtype, **options: bool) -> list[Tensor | None]:
    """The logits and all gradients of one pass."""
    image = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=dtype):
        output = network(image.contiguous(memory_format=torch.channels_last), **options)
    heads = [x for x in (output.logits, output.mu, output.var) if x is not None]
    sum(head.float().square().mean() for head in heads).backward()  # type: ignore[union-attr]
    return [output.logits.detach(), *(parameter.grad for parameter in network.parameters())]


@pytest.mark.parametrize("representations", [True, False])
def test_logits_and_gradients_are_autocasts_own(
    monkeypatch: pytest.MonkeyPatch, representations: bool
) -> None:
    got = trained(make_network(), torch.bfloat16, representations=representations)
    monkeypatch.setattr(network_module, "autocast_weights", lambda *_: contextlib.nullcontext())
    expected = trained(make_network(), torch.bfloat16, representations=representations)
    for own, other in zip(got, expected, strict=True):
        assert (own is None) == (other is None)
        if own is not None and other is not None:
            assert own.dtype == other.dtype
            assert torch.equal(own, other)
    assert any(gradient is None for gradient in got) != representations  # heads that were left out


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_a_part_is_cast_by_one_operation_and_its_parameters_stay() -> None:
    network = make_network()
    parameters = dict(network.named_parameters())
    with Counting() as counting:
        trained(network, torch.bfloat16)
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in network.modules())
    assert counting.calls["_foreach_copy_"] <= 2 * 9  # a part's weights, and their gradients
    assert counting.calls["_to_copy"] < convolutions
    assert dict(network.named_parameters()) == parameters
    assert all(torch.is_tensor(p.grad) and p.grad.dtype == torch.float32 for p in network.parameters())
    assert not any("weight" in module.__dict__ for module in network.modules())


def test_a_pass_that_fails_leaves_the_weights() -> None:
    network = make_network()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError):
        network(torch.rand(2, 4, 48, 48))  # four channels
    assert not any("weight" in module.__dict__ for module in network.modules())


def test_gradients_of_two_passes_in_one_context_are_added_in_float32() -> None:
    images = torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(1)).split(2)

    def gradients(network: SegmentationNetwork, passes: list[int]) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = [network(images[i], representations=False) for i in passes]
        sum(output.logits.float().square().mean() for output in outputs).backward()  # type: ignore[union-attr]
        return [p.grad for p in network.backbone_parameters() if p.grad is not None]

    network = make_network().eval()  # the statistics of one pass do not reach the other
    both = gradients(network, [0, 1])
    alone = [gradients(make_network().eval(), [i]) for i in (0, 1)]
    for found, first, second in zip(both, *alone, strict=True):
        torch.testing.assert_close(found, first + second, rtol=1e-6, atol=1e-9)
