"""The training loop: files of a run, bitwise resume, the guard, interruption."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from prcl_fast.config import Config, dump_config, override_config, parse_config
from prcl_fast.data.batches import Batch
from prcl_fast.data.sources.synthetic import SyntheticSource
from prcl_fast.engine.evaluate import evaluate
from prcl_fast.engine.guard import Failure, FiniteGuard, NonFiniteLossError
from prcl_fast.engine.trainer import InterruptedRunError, Trainer
from prcl_fast.errors import InputError
from prcl_fast.files.json_text import json_text
from prcl_fast.losses import explain_variance
from prcl_fast.methods import StepIndex
from prcl_fast.runs.checkpoint import load_checkpoint, load_run
from support.run_folders import final_state, same_state
from support.stub_networks import small_backbones
from support.tiny import tiny_tree

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def _small_networks() -> Iterator[None]:
    """Small backbones for runs in this process; `prcl train` in a process of its own has a whole one."""
    with small_backbones():
        yield


def run(config: Config) -> dict:
    return Trainer(config, QUIET).run()


def records(output: Path, kind: str) -> list[dict]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.mark.parametrize(
    "method",
    [
        {"name": "supervised"},
        {"name": "mean_teacher", "mix": "cutmix"},
        {"name": "prcl"},
        {"name": "prcl", "prototype": "local", "reduction": "sum", "normalize": True, "tau": 100.0},
        {"name": "prcl", "prototype": "ema", "mix": "cutout", "forward": "separate", "omega": "image"},
        {"name": "prcl", "representation": "deterministic", "virtual_negatives": 0, "confidence": "teacher"},
    ],
    ids=lambda method: "-".join(str(value) for value in method.values()),
)
def test_every_method_trains_and_leaves_a_whole_run(tmp_path: Path, method: dict) -> None:
    config = parse_config(tiny_tree(tmp_path / "run", **method), "tiny")
    summary = run(config)
    output = config.output
    assert summary["iterations"] == 6
    assert 0 <= summary["miou"] <= 100
    assert {"config.yaml", "metrics.jsonl", "last.pt", "best.pt", "tensorboard"} <= {
        path.name for path in output.iterdir()
    }
    assert not list(output.glob("*.tmp"))
    train = records(output, "train")
    assert [record["iteration"] for record in train] == [2, 4, 6]
    assert all(record["loss"] > 0 for record in train)
    if method["name"] == "prcl":
        assert all(record["loss_contrast"] > 0 for record in train)
        assert len(train[0]["anchors"]) == 6
    assert [record["iteration"] for record in records(output, "eval")] == [3, 6]


def test_the_weights_of_student_and_prototypes_move(tiny: Config) -> None:
    trainer = Trainer(tiny, QUIET)
    before = {name: value.clone() for name, value in trainer.method.state_dict().items()}
    trainer.run()
    after = trainer.method.state_dict()
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert not [name for name in still if name.startswith(("student", "teacher"))], still
    assert "contrast.precision" in before
    assert not [name for name in still if name.startswith("contrast")], still


def test_accumulation_sees_every_micro_batch(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path / "run")
    tree["train"] |= {"accumulate": 2, "batch_labeled": 4, "batch_unlabeled": 4, "iterations": 2}
    assert run(parse_config(tree, "tiny"))["iterations"] == 2


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_with_the_contrast_in_float32(tmp_path: Path, amp: str) -> None:
    tree = tiny_tree(tmp_path / "run")
    tree["train"] |= {"amp": amp, "iterations": 2}
    run(parse_config(tree, "tiny"))
    state = load_checkpoint(tmp_path / "run" / "last.pt")["method"]
    assert all(value.isfinite().all() for value in state.values())
    assert state["contrast.precision"].dtype == torch.float64


def test_two_runs_are_bitwise_equal(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(parse_config(tiny_tree(tmp_path / name), "tiny"))
    assert same_state(final_state(tmp_path / "a"), final_state(tmp_path / "b"))


@pytest.mark.parametrize("at", [1, 3])
def test_a_stopped_run_goes_on_exactly_where_it_was(tmp_path: Path, at: int) -> None:
    whole = parse_config(tiny_tree(tmp_path / "whole"), "tiny")
    run(whole)
    halves = parse_config(tiny_tree(tmp_path / "halves"), "tiny")
    first = Trainer(halves, QUIET)
    step = first.step

    def stopped(batches: Iterator[Batch]) -> dict[str, torch.Tensor]:
        first.stop.asked = first.iteration + 1 == at  # as a signal does during this step
        return step(batches)

    first.step = stopped  # type: ignore[method-assign]
    with pytest.raises(InterruptedRunError, match=f"stopped at iteration {at} of 6"):
        first.run()
    assert not records(halves.output, "eval")  # an interrupt does not wait for the one that is due at 3
    run(halves)
    assert same_state(final_state(whole.output), final_state(halves.output))
    for kind in ("train", "eval"):
        a, b = records(whole.output, kind), records(halves.output, kind)
        assert [r["iteration"] for r in a] == [r["iteration"] for r in b]
        if kind == "eval":
            assert a == b


def test_a_finished_run_is_only_reported_again(tiny: Config) -> None:
    first = run(tiny)
    state = (tiny.output / "last.pt").read_bytes()
    assert run(tiny) == first
    assert (tiny.output / "last.pt").read_bytes() == state


@pytest.mark.slow
def test_resume_is_bitwise_after_sigkill(tmp_path: Path) -> None:
    trees = {name: tiny_tree(tmp_path / name) for name in ("whole", "killed")}
    for tree in trees.values():
        tree["train"] |= {"iterations": 12, "eval_every": 6, "save_every": 2}
        tree["data"]["workers"] = 2
    files = {}
    for name, tree in trees.items():
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(tree))

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "prcl_fast.cli.main", "train", str(files[name])]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )

    whole = start("whole")
    out, error = whole.communicate(timeout=200)
    assert whole.returncode == 0, error.decode()
    draw = random.Random(0)
    kills = 0
    while kills < 1:
        process = start("killed")
        _wait_for_steps(process, tmp_path / "killed", draw.random())
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    last = start("killed")
    out, error = last.communicate(timeout=200)
    assert last.returncode == 0, error.decode()
    assert kills == 1
    assert json.loads(out.splitlines()[-1])["iterations"] == 12
    assert same_state(final_state(tmp_path / "whole"), final_state(tmp_path / "killed"))


def _wait_for_steps(process: subprocess.Popen, output: Path, share: float) -> None:
    """Waits until the run has saved once more since it started, then up to half a second."""
    marker = output / "last.pt"
    before = marker.stat().st_mtime_ns if marker.exists() else 0
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(FileNotFoundError):  # while a new one takes its name
            if marker.stat().st_mtime_ns != before:
                break
        time.sleep(0.01)
    time.sleep(0.5 * share)


def test_the_offline_evaluation_equals_the_one_in_training(tiny: Config) -> None:
    run(tiny)
    state = load_checkpoint(tiny.output / "last.pt")
    loaded = load_run(tiny.output / "last.pt", torch.device("cpu"))
    trainer = Trainer(tiny, QUIET)
    results = evaluate(loaded.networks, trainer.source, tiny.data, tiny.eval, torch.device("cpu"))
    assert results["teacher"].miou == state["progress"]["last"]["miou"]
    assert results["student"].miou == state["progress"]["last"]["miou_student"]


def test_validation_without_a_labeled_pixel_is_refused_or_has_null_as_miou(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = SyntheticSource.label

    def label(source: SyntheticSource, name: str) -> np.ndarray:
        found = read(source, name)
        return np.full_like(found, 255) if name.startswith("val") else found

    monkeypatch.setattr(SyntheticSource, "label", label)
    with pytest.raises(InputError, match=r"data\.val: no pixel of these images has a label"):
        Trainer(tiny, QUIET)
    assert not tiny.output.exists()
    summary = json.loads(json_text(run(override_config(tiny, ["data.scan=false"]))))
    assert [summary[key] for key in ("miou", "miou_student", "best_miou")] == [None] * 3
    assert all(record["miou"] is None for record in records(tiny.output, "eval"))


def test_notes_on_the_labels_come_before_the_first_step(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = SyntheticSource.label
    monkeypatch.setattr(SyntheticSource, "label", lambda source, name: np.minimum(read(source, name), 1))
    text = io.StringIO()
    Trainer(tiny, Console(file=text, width=200))
    assert "note: data.labeled: no pixel of these images has the classes" in text.getvalue()


def test_another_configuration_may_not_take_the_folder(tiny: Config) -> None:
    run(tiny)
    before = (tiny.output / "last.pt").read_bytes()
    with pytest.raises(InputError, match="holds another configuration's run"):
        Trainer(override_config(tiny, ["method.tau=7.0"]), QUIET)
    assert (tiny.output / "last.pt").read_bytes() == before


def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_the_run_ends_the_same(tiny: Config) -> None:
    run(tiny)
    state, path = final_state(tiny.output), tiny.output / "last.pt"
    path.write_bytes(path.read_bytes()[:1000])
    trainer = Trainer(tiny, QUIET)
    assert trainer.iteration == 4
    trainer.run()
    assert same_state(final_state(tiny.output), state)
    assert len((tiny.output / "last.pt.damaged").read_bytes()) == 1000


def test_where_all_checkpoints_are_damaged_they_are_named_and_kept(tiny: Config) -> None:
    run(tiny)
    for name in ("last.pt", "last-1.pt"):
        (tiny.output / name).write_bytes((tiny.output / name).read_bytes()[:1000])
    with pytest.raises(InputError, match=r"last\.pt: damaged.*last-1\.pt: damaged"):
        Trainer(tiny, QUIET)
    assert len((tiny.output / "last.pt").read_bytes()) == 1000


def test_an_unwritable_output_is_an_input_error(tmp_path: Path, tiny: Config) -> None:
    (tmp_path / "file").write_text("")
    config = parse_config(dump_config(tiny) | {"output": str(tmp_path / "file" / "run")}, "tiny")
    with pytest.raises(InputError, match=r"output: .*cannot be written"):
        Trainer(config, QUIET)


def spoil(trainer: Trainer, iterations: Collection[int], how: str) -> None:
    """Makes a loss, or only its gradient, not finite in some steps."""
    losses = trainer.method.losses

    def spoilt(batch: Batch, step: StepIndex) -> dict[str, torch.Tensor]:
        values = losses(batch, step)
        if int(step.iteration) in iterations:
            if how == "loss_contrast":
                values["loss_contrast"] = values["loss_contrast"] * float("nan")
                values["loss"] = values["loss"] + values["loss_contrast"]
                # As after an overflow in the network.
                for name, buffer in trainer.method.student.backbone.named_buffers():
                    if name.endswith("running_mean"):
                        buffer.data.fill_(torch.nan)
            else:
                values["loss"] = values["loss"] + _finite_with_infinite_slope(values["loss"])
        return values

    trainer.method.losses = spoilt  # type: ignore[method-assign]


def _finite_with_infinite_slope(x: torch.Tensor) -> torch.Tensor:
    return ((x - x.detach()).clamp(min=0) + 0.0).sqrt()


@pytest.mark.parametrize("what", ["term loss_contrast", "gradient"])
def test_what_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tiny: Config, what: str) -> None:
    trainer = Trainer(tiny, QUIET)
    spoil(trainer, {4}, what.split()[-1])
    with pytest.raises(
        NonFiniteLossError, match=rf"the {what} was not finite at iteration 4 \(seed 0, images labeled_"
    ):
        trainer.run()
    assert all(value.isfinite().all() for value in trainer.method.student.parameters())
    state = load_checkpoint(tiny.output / "last.pt")
    assert state["iteration"] == 4
    assert all(value.isfinite().all() for value in state["method"].values())


@pytest.mark.parametrize("what", ["loss_contrast", "gradient"])
def test_a_step_that_is_not_finite_can_be_left_out(tmp_path: Path, what: str) -> None:
    tree = tiny_tree(tmp_path / "run")
    tree["train"]["on_nonfinite"] = "skip"
    console = Console(record=True, file=io.StringIO(), width=300)
    trainer = Trainer(parse_config(tree, "tiny"), console)
    spoil(trainer, {3}, what)
    before: dict[str, torch.Tensor] = {}
    step = trainer.step

    def watched(batches: Iterator[Batch]) -> dict[str, torch.Tensor]:
        before.update({name: value.clone() for name, value in trainer.method.state_dict().items()})
        losses = step(batches)
        kept = [
            torch.equal(value, before[name])
            for name, value in trainer.method.state_dict().items()
            if name.startswith(("student", "contrast."))
        ]
        assert all(kept) if trainer.iteration == 4 else not any(kept), kept
        return losses

    trainer.step = watched  # type: ignore[method-assign]
    assert trainer.run()["iterations"] == 6
    assert "left out, 1 such steps since the start" in console.export_text()
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert all(value.isfinite().all() for value in state["method"].values())


def test_a_run_of_which_every_step_is_left_out_is_stopped(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path / "run")
    tree["train"] |= {"on_nonfinite": "skip", "iterations": 40, "eval_every": 40}
    trainer = Trainer(parse_config(tree, "tiny"), QUIET)
    spoil(trainer, range(5, 40), "loss_contrast")
    with pytest.raises(NonFiniteLossError, match="10 steps in a row"):
        trainer.run()
    assert trainer.iteration == 15


def test_a_gradient_that_is_infinite_at_any_loss_scale_ends_the_run(tmp_path: Path) -> None:
    """The scaler alone would skip such steps until the scale is 0."""
    tree = tiny_tree(tmp_path / "run", name="supervised")
    tree["train"] |= {"amp": "fp16", "iterations": 40, "eval_every": 40, "log_every": 1}
    trainer = Trainer(parse_config(tree, "tiny"), QUIET)
    spoil(trainer, range(4, 40), "gradient")
    with pytest.raises(NonFiniteLossError, match="the gradient was not finite at iteration 21 "):
        trainer.run()  # 65536 has been halved 17 times


def test_the_guard_names_the_first_term_and_iteration_and_counts() -> None:
    guard = FiniteGuard(("loss", "loss_a", "loss_b"), torch.device("cpu"))
    good, bad = 1.0, float("inf")
    guard.watch(torch.tensor([good, good, good]), torch.tensor(0))
    assert guard.take() is None
    assert guard.bad == 0
    guard.watch(torch.tensor([bad, good, bad]), torch.tensor(1))
    guard.watch(torch.tensor([bad, bad, bad]), torch.tensor(2))
    assert guard.bad == 1
    assert guard.take() == Failure("term loss_b", 1, steps=2, in_a_row=2)
    guard.watch(torch.tensor([good, good, good]), torch.tensor(3))
    assert guard.take() is None
    guard.watch(torch.tensor([bad, good, good]), torch.tensor(4))
    assert guard.take() == Failure("term loss", 4, steps=3, in_a_row=1)


@pytest.mark.parametrize(("mean", "sentence"), [(0.5, None), (0.99, "explode"), (1e-5, "collapse")])
def test_variances_at_either_end_come_with_advice(mean: float, sentence: str | None) -> None:
    note = explain_variance(mean)
    assert note is None if sentence is None else f"the variances {sentence}" in (note or "")
    assert note is None or "optim.probability_lr" in note


def test_a_stalled_loader_ends_the_run_and_names_its_images(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path / "run")
    tree["data"]["workers"] = 1
    tree["train"] |= {"iterations": 100000, "eval_every": 100000, "save_every": 1, "stall_timeout": 2.0}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    process = subprocess.Popen(
        [sys.executable, "-m", "prcl_fast.cli.main", "train", str(tmp_path / "run.yaml")],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _wait_for_steps(process, tmp_path / "run", 0.0)
        (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(worker), signal.SIGSTOP)
        _, error = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1
    line = error.splitlines()[-1]
    assert line.startswith("prcl: no progress for 2 s, waiting for data at iteration "), error
    assert "images labeled_" in line
    assert load_checkpoint(tmp_path / "run" / "last.pt")["iteration"] >= 1
