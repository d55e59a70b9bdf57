"""FlatState: the state of a network in one tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from prcl_fast.models.teacher import FlatState


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1))
    return layers.to(memory_format=torch.channels_last)


def test_every_tensor_keeps_identity_values_and_strides_and_lies_in_the_flat_one() -> None:
    flat_network, plain = network(), network()
    before = [*flat_network.parameters(), *flat_network.buffers()]
    optimizer = torch.optim.SGD(flat_network.parameters(), lr=0.1)
    flat = FlatState(flat_network)
    after = [*flat_network.parameters(), *flat_network.buffers()]
    for old, new, expected in zip(before, after, [*plain.parameters(), *plain.buffers()], strict=True):
        assert old is new
        assert torch.equal(new, expected)
        assert new.stride() == expected.stride()
    assert [x.dtype for x in flat.others] == [torch.int64]
    image = torch.randn(2, 3, 6, 6)
    assert torch.equal(flat_network(image), plain(image))
    flat_network(image).sum().backward()
    optimizer.step()  # through the parameters that it was given before
    total = sum(float(x.detach().abs().sum()) for x in after if x.is_floating_point())
    assert float(flat.values.abs().sum()) == pytest.approx(total)


def test_what_changes_the_flat_tensor_changes_the_network() -> None:
    one, other = network(), network()
    flat_one, flat_other = FlatState(one), FlatState(other)
    flat_other.values += 1.0
    flat_one.values.lerp_(flat_other.values, torch.tensor(0.25))
    for a, b in zip(one.parameters(), network().parameters(), strict=True):
        torch.testing.assert_close(a, b + 0.25)


def test_a_network_that_moved_is_not_held_any_more() -> None:
    moved = network()
    flat = FlatState(moved)
    assert flat.holds(moved)
    assert not flat.holds(copy.deepcopy(moved))
    moved.double()
    assert not flat.holds(moved)


def test_two_types_are_refused() -> None:
    mixed = network()
    mixed[2].half()
    with pytest.raises(TypeError, match="one type"):
        FlatState(mixed)


def test_a_network_in_one_tensor_is_compiled_for_training_as_any_other() -> None:
    flat_network, plain = network().train(), network().train()
    FlatState(flat_network)
    compiled = torch.compile(lambda image: flat_network(image), backend="aot_eager", fullgraph=True)
    for images in (2, 3):  # another shape is compiled anew
        image = torch.randn(images, 3, 6, 6)
        for one in (compiled, plain):
            one(image).square().sum().backward()
    for found, expected in zip(flat_network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
    for found, expected in zip(flat_network.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected)
