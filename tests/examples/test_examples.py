"""The scripts of examples/: each trains, and the steps of own_loop.py are those of the method PRCL."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from prcl_fast.config import parse_config
from prcl_fast.data.augment import strong_augment
from prcl_fast.data.batches import Batch, UnlabeledBatch
from prcl_fast.data.draws import StrongDraws
from prcl_fast.methods import PRCL, StepIndex, build_method
from support.paths import ROOT

TOTAL = 40


def example(name: str) -> ModuleType:
    """A script of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "falling"),
    [("own_loop", ("L", "L_s", "L_c")), ("segformer", ("loss", "cross-entropy", "contrast"))],
)
def test_an_example_learns(name: str, falling: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    module = example(name)
    module.main()
    *steps, last = capsys.readouterr().out.splitlines()
    assert len(steps) == module.STEPS // 10
    losses = [
        {term: float(value) for term, value in re.findall(r"([\w-]+) (\d+\.\d+)", line)} for line in steps
    ]
    for term in falling:
        assert losses[-1][term] < losses[0][term], term
    background = float((module.generated(64)[1] == 0).float().mean())
    assert float(last.split()[-1]) > background + 0.1


def made_up_batch(step: int) -> Batch:
    """Images and labels at random, some pixels not labeled, with colour jitter and no blur."""
    drawn = torch.Generator().manual_seed(step)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=drawn)

    label = torch.randint(4, (2, 32, 32), generator=drawn, dtype=torch.uint8)
    label[:, :3] = 255
    strong = StrongDraws(
        color=torch.eye(3) + 0.3 * uniform(2, 3, 3),
        lift=uniform(2),
        blur=torch.ones(2, 1),
        box=torch.zeros(2, 4, dtype=torch.int64),
        class_score=uniform(2, 256),
        partner=torch.tensor([1, 0]),
    )
    return Batch(
        labeled_image=uniform(2, 3, 32, 32),
        label=label,
        unlabeled=UnlabeledBatch(
            image=uniform(2, 3, 32, 32), inside=torch.ones(2, 32, 32, dtype=torch.bool), strong=strong
        ),
        seed=torch.tensor([0, step]),
    )


def test_steps_of_own_loop_are_those_of_the_method_prcl_bit_for_bit(tmp_path: Path) -> None:
    own = example("own_loop")
    own.DELTA_U, own.DELTA_W = 0.26, 0.26  # on images at random, where a network is never sure of one of 4
    config = parse_config(
        {
            "output": str(tmp_path),
            "data": {"kind": "synthetic", "crop": [32, 32], "mean": [0, 0, 0], "std": [1, 1, 1]},
            "model": {"backbone": "resnet18", "base_width": 8, "width": 16, "dim": 8},
            "method": {"name": "prcl", "mix": "none", "ema": 0.5, "delta_u": 0.26, "delta_w": 0.26}
            | {"tau": 10.0, "anchors": 16, "negatives": 16},
            "train": {"iterations": TOTAL},
        },
        "test",
    )
    torch.manual_seed(0)
    method = build_method(config, 4)
    assert isinstance(method, PRCL)
    student = own.SegmentationNetwork(
        "resnet18", base_width=8, num_classes=4, width=16, representation_dim=8, probability=True
    )
    student.load_state_dict(method.student.state_dict())
    teacher = own.EMATeacher(student, decay=0.5)
    contrast = own.ProbabilisticContrast(4, 8, tau=10.0, anchors=16, negatives=16)
    optimizers = [torch.optim.SGD(network.parameters(), 0.1) for network in (method.student, student)]
    for number in range(3):  # a state of the prototypes, and a teacher apart from the student
        iteration, batch = torch.tensor(number), made_up_batch(number)
        wanted = method(batch, StepIndex(iteration, TOTAL))
        unlabeled = batch.needed_unlabeled()
        strong = strong_augment(unlabeled.image, unlabeled.strong)
        # In the trainer's memory format, so that the same kernels run.
        image, weak, strong = (
            images.contiguous(memory_format=torch.channels_last)
            for images in (batch.labeled_image, unlabeled.image, strong)
        )
        found = own.losses(student, teacher, contrast, image, batch.label, weak, strong, iteration, TOTAL)
        names = {"L": "loss", "L_s": "loss_supervised", "L_u": "loss_unsupervised", "L_c": "loss_contrast"}
        for own_name, name in names.items():
            assert found[own_name] == wanted[name] > 0.1, name
        for optimizer, loss in zip(optimizers, (wanted["loss"], found["L"]), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        method.after_step(StepIndex(iteration, TOTAL))
        teacher.update(iteration)
        for weight, own_weight in zip(
            method.parameters(), [*student.parameters(), *teacher.parameters()], strict=True
        ):
            assert torch.equal(own_weight, weight)
