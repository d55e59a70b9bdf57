"""Batch counters of batch norm: the same numbers one by one and all together."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from prcl_fast.config import parse_config
from prcl_fast.engine.trainer import Trainer
from prcl_fast.models.batch_norm import BatchNorm2d
from prcl_fast.models.network import SegmentationNetwork
from support.tiny import tiny_tree


class Additions(TorchDispatchMode):
    """Counts in-place additions to int64 tensors by op."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        first = first[0] if isinstance(first, list) else first
        if isinstance(first, Tensor) and first.dtype == torch.int64 and "add_" in str(func):
            self.calls.append(str(func.overloadpacket))
        return func(*args, **kwargs or {})


def network() -> SegmentationNetwork:
    return SegmentationNetwork(
        "resnet18", base_width=8, num_classes=3, width=16, representation_dim=4, probability=True
    )


def counts(module: nn.Module) -> dict[str, int]:
    state = module.state_dict()
    return {name: int(value) for name, value in state.items() if name.endswith("num_batches_tracked")}


def test_a_pass_counts_the_layers_that_it_uses_by_one_addition() -> None:
    model, images = network(), torch.randn(2, 3, 32, 32)
    with Additions() as added:
        model(images)
    assert added.calls == ["aten._foreach_add_"]
    model(images, representations=False)
    assert set(counts(model).values()) == {1, 2}
    for name, count in counts(model).items():
        assert count == (1 if name.startswith(("representation", "probability")) else 2), name


class PyTorchsLayer(nn.BatchNorm2d):
    """Counts as nn.BatchNorm2d does, also if an op replaces its forward."""

    def count_pass(self) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)


def test_counts_of_a_network_are_those_of_pytorchs_layers() -> None:
    own = network()
    theirs = copy.deepcopy(own)
    for module in theirs.modules():
        if isinstance(module, BatchNorm2d):
            module.__class__ = PyTorchsLayer
    images = torch.randn(1, 3, 32, 32)  # one image: the pooling's layer is left out
    for model in (own, theirs):
        model(images)
        model.eval()(images)
        model.train()
        model.backbone.eval()
        model(torch.cat([images, images]), representations=False)
    assert counts(own)["decoder.aspp.pooling.bn.num_batches_tracked"] == 1
    assert counts(own)["backbone.bn1.num_batches_tracked"] == 1
    assert list(own.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(own.state_dict()[name], value), name


def test_a_pass_that_failed_counts_nothing_and_layers_count_for_themselves_again() -> None:
    model = network()
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 4, 32, 32))  # four channels
    assert sum(counts(model).values()) == 0
    model.backbone(torch.randn(2, 3, 32, 32))
    assert counts(model)["backbone.bn1.num_batches_tracked"] == 1


def test_a_layer_outside_of_a_pass_counts_for_itself() -> None:
    model = network()
    model.backbone(torch.randn(2, 3, 32, 32))
    assert counts(model)["backbone.bn1.num_batches_tracked"] == 1
    assert sum(counts(model.decoder).values()) == 0
    layer = BatchNorm2d(3)
    layer(torch.randn(2, 3, 4, 4))
    assert layer.num_batches_tracked == 1


def test_a_pass_that_fails_is_not_counted() -> None:
    model = network()
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 4, 32, 32))
    model.decoder.aspp.project.weight.data = model.decoder.aspp.project.weight.data[:, :-1]
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3, 32, 32))
    assert set(counts(model).values()) == {0}
    good = network()
    model.decoder.aspp.project.weight.data = good.decoder.aspp.project.weight.data
    model(torch.randn(2, 3, 32, 32))
    assert set(counts(model).values()) == {1}


def test_a_copy_of_a_network_counts_its_own_passes() -> None:
    model = network()
    other = copy.deepcopy(model)
    other(torch.randn(2, 3, 32, 32))
    assert set(counts(other).values()) == {1}
    assert set(counts(model).values()) == {0}


def test_a_compiled_network_counts_each_pass() -> None:
    model = network()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(torch.randn(2, 3, 32, 32))
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(2):
            compiled(torch.randn(2, 3, 32, 32))
    assert set(counts(model).values()) == {3}


@pytest.mark.parametrize(
    ("method", "after_three_steps"),
    [
        ({"forward": "concatenated"}, {"backbone": 3, "representation": 3, "probability": 3}),
        ({"forward": "separate"}, {"backbone": 6, "representation": 6, "probability": 6}),
        ({"warmup": 2}, {"backbone": 3, "representation": 1, "probability": 1}),
    ],
    ids=["concatenated", "separate", "warm-up"],
)
def test_a_training_counts_every_pass_of_the_student(
    tmp_path: Path, method: dict[str, Any], after_three_steps: dict[str, int]
) -> None:
    tree = tiny_tree(tmp_path / "run", **method)
    tree["data"]["crop"] = [32, 32]
    trainer = Trainer(parse_config(tree, "tiny"), Console(quiet=True))
    batches = trainer.batches()
    for _ in range(3):
        trainer.step(batches)
    batches.close()
    student = trainer.method.student
    for part, count in after_three_steps.items():
        assert set(counts(getattr(student, part)).values()) == {count}, part
    teacher = trainer.method.networks()["teacher"]
    assert counts(teacher) == counts(student)
