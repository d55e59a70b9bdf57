"""The optimiser step as a graph: replayed steps equal eager ones, on the CPU and on CUDA."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from bench.step.same_losses import AGAIN, NUDGED, compared, held, nudge
from prcl_fast.config import parse_config
from prcl_fast.engine import step
from prcl_fast.engine.graph import cloned, copy_batch
from prcl_fast.engine.guard import FiniteGuard
from prcl_fast.engine.trainer import Trainer
from prcl_fast.errors import InputError
from prcl_fast.losses import contrast
from support.recording import HostReadError, Recording
from support.stub_networks import small_backbones
from support.tiny import tiny_tree

WARM_UP, STEPS = 2, 8


def trainer_in(folder: Path, train: dict[str, Any], method: dict[str, Any]) -> Trainer:
    tree = tiny_tree(folder, **method)
    tree["train"] |= {"iterations": STEPS} | train
    return Trainer(parse_config(tree, "tiny"), Console(quiet=True))


@pytest.mark.parametrize(
    ("train", "method"),
    [
        ({}, {"prototype": "global", "virtual_negatives": 4, "anchors_per_set": 4}),
        ({"accumulate": 2, "batch_labeled": 2, "batch_unlabeled": 4}, {"prototype": "ema"}),
        ({"amp": "fp16"}, {"mix": "cutmix", "forward": "separate", "omega": "image"}),
        ({"amp": "bf16"}, {"name": "mean_teacher", "mix": "cutout"}),
        ({}, {"name": "supervised"}),
        ({}, {"name": "pcr", "warmup": 4, "delta_u": 0.2}),
        ({}, {"name": "pcr", "warmup": 4, "delta_u": 0.2, "predictor": "prototype", "features": "aspp"}),
        ({}, {"name": "cps", "mix": "cutmix"}),
        ({"amp": "bf16"}, {"name": "cps", "mix": "none"}),
        ({}, {"name": "pps", "prototypes": 2, "layers": 1, "heads": 2}),
        ({}, {"virtual_negatives": 0, "memory_bank": 160}),
    ],
    ids=[
        *("prcl", "accumulated", "fp16", "mean_teacher", "supervised"),
        *("pcr", "prototypes alone", "cutmix cps", "cps", "pps", "memory_bank"),
    ],
)
def test_replayed_steps_are_the_eager_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: dict[str, Any], method: dict[str, Any]
) -> None:
    # Both read from the device, but only on a CPU.
    monkeypatch.setattr(FiniteGuard, "take", lambda self: None)
    monkeypatch.setattr(contrast, "check_variance", lambda name, value: None)
    if train.get("amp") == "fp16":  # only the gradient scale: convolutions in fp16 take a CPU a minute
        monkeypatch.setattr(step, "autocast", lambda *_: contextlib.nullcontext())
    # All methods have the same backbone: one is tested with it, the others with a small one.
    small = contextlib.nullcontext() if "anchors_per_set" in method else small_backbones()
    with small:
        eager, replayed = (trainer_in(tmp_path / name, train, method) for name in ("eager", "replayed"))
    recording: Recording | None = None
    phase = 0  # the first recorded step
    with contextlib.closing(eager.batches()) as batches:
        for number in range(STEPS):
            micro_batches = [next(batches) for _ in range(eager.config.train.accumulate)]
            if eager.method.begin_step(number):
                assert replayed.method.begin_step(number)
                recording, phase = None, number
            expected = eager.train_step(micro_batches)
            if number < phase + WARM_UP:
                losses = replayed.train_step(micro_batches)
            elif recording is None:
                inputs = [cloned(batch) for batch in micro_batches]
                recording = Recording(lambda inputs=inputs: replayed.train_step(inputs))
                losses = recording.outputs
            else:
                for own, batch in zip(inputs, micro_batches, strict=True):
                    copy_batch(own, batch)
                recording.replay()
            assert losses.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(losses[name], value), (number, name)
    assert replayed.train_step.iteration == STEPS
    assert replayed.train_step.take_record() == eager.train_step.take_record()
    assert replayed.method.diagnostics() == eager.method.diagnostics()
    for name, value in eager.method.state_dict().items():
        assert torch.equal(replayed.method.state_dict()[name], value), name


def test_a_recording_refuses_what_the_host_reads() -> None:
    value = torch.ones(3)
    for read in (lambda: value.sum().item(), lambda: value[value > 0], lambda: value.nonzero()):
        with pytest.raises(HostReadError):
            Recording(read)


def test_a_batch_of_another_shape_is_refused(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, {}, {})
    with contextlib.closing(trainer.batches()) as batches:
        batch = next(batches)
    own = cloned(batch)
    assert own.labeled_image.stride() == batch.labeled_image.stride()
    batch.label = batch.label[:, :-1]
    with pytest.raises(ValueError, match=r"takes \[2, 64, 64\]; got \[2, 63, 64\]"):
        copy_batch(own, batch)


@pytest.mark.parametrize("key", ["graph", "sync_check"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_what_needs_a_gpu_says_so_without_one(tmp_path: Path, key: str) -> None:
    with pytest.raises(InputError, match=f"train.{key}: needs a CUDA device; this run is on cpu"):
        trainer_in(tmp_path / "run", {key: True}, {})
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("train", "method"),
    [
        ({}, {}),
        ({"amp": "bf16"}, {}),
        ({"amp": "fp16"}, {}),
        ({"accumulate": 2, "batch_unlabeled": 4}, {}),
        ({}, {"virtual_negatives": 0, "memory_bank": 160}),
        ({}, {"name": "pcr", "warmup": 4, "delta_u": 0.2}),  # captured before and after the warm-up's end
        ({}, {"name": "cps"}),
        ({}, {"name": "pps", "prototypes": 2, "layers": 1, "heads": 2}),
    ],
)
def test_a_captured_run_has_the_losses_of_an_eager_one(
    tmp_path: Path, train: dict[str, Any], method: dict[str, Any]
) -> None:
    def curve(name: str, *, graph: bool = False, nudged: bool = False) -> Tensor:
        own = train | {"graph": graph, "sync_check": True, "device": "cuda", "tf32": False}
        trainer = trainer_in(tmp_path / name, own, method)
        if nudged:
            nudge(trainer)
        with contextlib.closing(trainer.batches()) as batches:
            return torch.stack([trainer.step(batches)["loss"].clone() for _ in range(STEPS)]).double().cpu()

    eager = curve("eager")
    # Two equal runs may differ on a GPU.
    controls = {AGAIN: curve("again"), NUDGED: curve("nudged", nudged=True)}
    assert_near(curve("captured", graph=True), eager, controls)


def assert_near(found: Tensor, expected: Tensor, controls: dict[str, Tensor]) -> None:
    """Losses [steps] agree to rounding in the first step, and later as closely as the controls do."""

    def row(name: str, losses: Tensor) -> dict[str, Any]:
        return {"variant": name, "exact": False} | compared(expected[:, None], losses[:, None], window=1)

    rows = [row(name, losses) for name, losses in controls.items()]
    assert held(row("found", found), rows), (found, expected, controls)


def test_a_run_may_be_as_far_from_another_as_their_controls_are() -> None:
    expected = torch.ones(4, dtype=torch.float64)
    near, apart = torch.tensor([1, 1 + 5e-5, 1, 1]), torch.tensor([1.0, 1.0, 1.1, 1.2])
    assert_near(near, expected, {AGAIN: expected})
    assert_near(apart, expected, {AGAIN: expected, NUDGED: torch.tensor([1.0, 1.0, 1.0, 1.15])})
    for wrong, control in ((apart, near), (apart + 0.3, apart), (expected + 1e-3, apart)):
        with pytest.raises(AssertionError):
            assert_near(wrong, expected, {AGAIN: control})
