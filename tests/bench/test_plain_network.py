"""The network of the alternatives: outputs of the package's network, by PyTorch's ops alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.step.plain_network import made_plain
from prcl_fast.models.network import SegmentationNetwork


class Operations(TorchDispatchMode):
    """The namespaces of the called ops."""

    def __init__(self) -> None:
        super().__init__()
        self.namespaces: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.namespaces.add(func.namespace)
        return func(*args, **(kwargs or {}))


def test_a_plain_network_has_the_same_outputs_and_counts_without_an_op_of_the_package() -> None:
    torch.manual_seed(0)
    own = SegmentationNetwork(
        "resnet18", base_width=8, num_classes=5, width=16, representation_dim=8, probability=True
    ).double()
    plain = made_plain(copy.deepcopy(own))
    image = torch.rand(2, 3, 64, 48, dtype=torch.float64)
    expected = own(image)
    with Operations() as operations:
        found = plain(image)
        sum(x.sum() for x in (found.logits, found.mu, found.var)).backward()
    assert operations.namespaces == {"aten"}
    for name in ("logits", "mu", "var"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    for name, value in own.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], value)
