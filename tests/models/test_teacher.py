"""The EMA teacher: warm start, buffers, and its separation from the student."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from prcl_fast.config import parse_config
from prcl_fast.engine.trainer import Trainer
from prcl_fast.models.network import SegmentationNetwork
from prcl_fast.models.teacher import EMATeacher
from support.stub_networks import small_backbones
from support.tiny import tiny_tree


@pytest.fixture
def student() -> SegmentationNetwork:
    torch.manual_seed(0)
    return SegmentationNetwork("resnet18", num_classes=4, width=16, representation_dim=8, probability=True)


def change(network: torch.nn.Module) -> None:
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor += torch.rand_like(tensor)
            else:
                tensor += 3


def copy_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def test_first_update_copies_the_student(student):
    teacher = EMATeacher(student)
    change(student)
    teacher.update(torch.tensor(0))
    for key, value in student.state_dict().items():
        torch.testing.assert_close(teacher.network.state_dict()[key], value, rtol=0, atol=0)


@pytest.mark.parametrize(("step", "decay"), [(1, 0.5), (3, 0.75), (99, 0.99), (5000, 0.99)])
def test_update_averages_parameters_and_buffers_with_the_warm_decay(student, step, decay):
    teacher = EMATeacher(student)
    before = copy_of(teacher.network)
    change(student)
    teacher.update(torch.tensor(step))
    now, target = teacher.network.state_dict(), student.state_dict()
    kinds = set()
    for key, value in target.items():
        kinds.add(key.rsplit(".", 1)[1])
        expected = decay * before[key] + (1 - decay) * value if value.is_floating_point() else value
        torch.testing.assert_close(now[key], expected, rtol=1e-5, atol=1e-6)
    assert {"weight", "running_mean", "running_var", "num_batches_tracked", "fc1", "gamma"} <= kinds


def test_decay_limit_can_be_set(student):
    teacher = EMATeacher(student, decay=0.9)
    before = teacher.network.classifier[3].bias.clone()
    change(student)
    teacher.update(torch.tensor(1000))
    expected = 0.9 * before + 0.1 * student.classifier[3].bias
    torch.testing.assert_close(teacher.network.classifier[3].bias, expected)


def test_update_follows_a_student_whose_tensors_moved(student):
    teacher = EMATeacher(student)
    teacher.update(torch.tensor(0))
    student.double()
    teacher.double()
    change(student)
    teacher.update(torch.tensor(0))
    assert teacher.network.backbone.bn1.running_mean.dtype == torch.float64
    for key, value in student.state_dict().items():
        torch.testing.assert_close(teacher.network.state_dict()[key], value, rtol=0, atol=0)


def test_teacher_stays_in_evaluation_mode_and_its_statistics_do_not_see_batches(student):
    teacher = EMATeacher(student).train()
    assert not any(module.training for module in teacher.network.modules())
    before = copy_of(teacher.network)
    teacher(torch.randn(2, 3, 32, 32) + 5)
    assert all(torch.equal(before[key], value) for key, value in teacher.network.state_dict().items())
    assert student.training


def test_teacher_gives_no_gradient_and_skips_representations(student):
    teacher = EMATeacher(student)
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    output = teacher(images)
    assert not output.logits.requires_grad
    assert output.mu is None
    assert teacher(images, representations=True).var is not None
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())


def test_teacher_shares_no_memory_with_the_student_and_does_not_hold_it_as_state(student):
    teacher = EMATeacher(student)
    assert set(teacher.state_dict()) == {f"network.{key}" for key in student.state_dict()}
    pointers = {tensor.data_ptr() for tensor in student.state_dict().values()}
    assert pointers.isdisjoint(tensor.data_ptr() for tensor in teacher.state_dict().values())


def test_teacher_keeps_the_memory_format(student):
    student.to(memory_format=torch.channels_last)
    teacher = EMATeacher(student)
    change(student)
    teacher.update(torch.tensor(4))
    weight = teacher.network.backbone.layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("compiled", [False, True])
def test_no_tensor_moves_and_nothing_is_compiled_anew_after_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compile_network = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_network(self, backend=counter))
    tree = tiny_tree(tmp_path / "run", name="mean_teacher")
    tree["train"]["compile"] = compiled
    with small_backbones():
        trainer = Trainer(parse_config(tree, "tiny"), Console(quiet=True))
    state = [*trainer.method.parameters(), *trainer.method.buffers()]
    before = [tensor.data_ptr() for tensor in state]
    counts = []
    with contextlib.closing(trainer.batches()) as batches:
        for _ in range(3):
            trainer.step(batches)
            counts.append(counter.frame_count)
    assert [tensor.data_ptr() for tensor in state] == before
    assert counts == ([2] * 3 if compiled else [0] * 3)  # the student and the teacher
