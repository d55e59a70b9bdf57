"""Captured steps: refused configurations, eager warm-up, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from prcl_fast.config import parse_config
from prcl_fast.engine import graph
from prcl_fast.engine.graph import CapturedStep, check_capture, on_stream, warm_up_steps
from prcl_fast.engine.trainer import Trainer
from prcl_fast.errors import InputError
from prcl_fast.processes.collectives import backend
from support.processes import Pair, launch
from support.tiny import shared_tree, tiny_tree

CUDA = torch.device("cuda", 0)


def check(
    monkeypatch: pytest.MonkeyPatch, train: dict[str, Any], world: int, carrier: str = "nccl", **method: Any
) -> None:
    monkeypatch.setattr(graph, "world_size", lambda: world)
    monkeypatch.setattr(graph, "backend", lambda device: {"cpu": "gloo", "cuda": carrier}[device])
    tree = tiny_tree(Path("run"), **method)
    tree["train"] |= train
    check_capture(parse_config(tree, "tiny"), CUDA)


@pytest.mark.parametrize("sync_bn", [True, False])
def test_a_step_of_several_processes_may_be_captured_and_watched_with_nccl(
    monkeypatch: pytest.MonkeyPatch, sync_bn: bool
) -> None:
    for world in (1, 2, 8):
        check(monkeypatch, {"graph": True, "sync_check": True, "sync_bn": sync_bn}, world)
    check(monkeypatch, {"graph": True, "sync_check": True}, 1, warmup=2)
    check(monkeypatch, {"sync_check": True}, 2, "gloo")


def test_a_graph_of_gloos_collectives_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError, match=r"^train.graph: .* only the collectives of NCCL; these 2 processes use gloo, set it"
    ):
        check(monkeypatch, {"graph": True}, 2, "gloo")


def test_a_graph_of_several_processes_that_nothing_watches_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(monkeypatch, {"graph": True, "stall_timeout": None}, 1)
    with pytest.raises(InputError, match=r"^train.stall_timeout: must be set where train.graph captures"):
        check(monkeypatch, {"graph": True, "stall_timeout": None}, 2)


@pytest.mark.parametrize("key", ["graph", "sync_check"])
def test_a_warm_up_on_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    with pytest.raises(InputError, match=rf"^train.{key}: .* set method.warmup=0 or train.{key}=false$"):
        check(monkeypatch, {key: True}, 2, warmup=2)


def _backends(rank: int) -> list[str]:
    return [backend(device) for device in ("cpu", "cuda")]


def test_processes_that_gloo_joined_use_it_for_both_devices(two: Pair) -> None:
    assert two(_backends) == [["gloo", "gloo"]] * 2


class _Graph:
    def __init__(self) -> None:
        self.replayed = 0

    def replay(self) -> None:
        self.replayed += 1


@pytest.mark.parametrize(("world", "eager"), [(1, 3), (2, 11)])
def test_a_step_is_captured_after_the_eager_ones_that_its_processes_need(
    monkeypatch: pytest.MonkeyPatch, world: int, eager: int
) -> None:
    monkeypatch.setattr(graph, "world_size", lambda: world)
    made = _Graph()
    monkeypatch.setattr(CapturedStep, "_capture", lambda self: made)
    calls: list[int] = []
    captured = CapturedStep(lambda batches: calls.append(1) or {}, None)  # type: ignore[arg-type, func-returns-value]
    assert warm_up_steps() == eager
    for _ in range(eager):
        captured([])
    assert (len(calls), made.replayed) == (eager, 0)
    for _ in range(2):
        captured([])
    assert (len(calls), made.replayed) == (eager, 2)
    captured.forget()
    captured([])
    assert len(calls) == eager + 1


def test_a_run_drops_its_graph_before_it_leaves_the_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """NCCL waits for the end of a graph that holds its collectives."""
    tree = tiny_tree(tmp_path / "run", name="supervised")
    tree["data"]["crop"] = [32, 32]
    run = Trainer(parse_config(tree, "tiny"), Console(quiet=True))
    monkeypatch.setattr(CapturedStep, "_capture", lambda self: _Graph())
    captured = CapturedStep(run.train_step, None)  # type: ignore[arg-type]
    run._run_step = captured
    held = []
    monkeypatch.setattr(run, "_evaluate", lambda log: held.append(captured._graph is not None))
    monkeypatch.setattr(run, "summary", dict)
    captured._outputs = {"loss": torch.zeros(())}
    run.run()
    assert held == [False, True]
    assert captured._graph is None


_JOIN = """
import os, socket, torch
from prcl_fast.processes.launch import Launch
from prcl_fast.processes.rendezvous import join
with socket.create_server(("127.0.0.1", 0)) as free:
    here = Launch(0, 1, 0, 1, "127.0.0.1", free.getsockname()[1], "torchrun")
with join(here, torch.device("cpu"), 60.0, captures={captures}):
    print(os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"])
"""


@pytest.mark.parametrize(("captures", "handling"), [(True, "0"), (False, "1")])
def test_nccl_leaves_errors_to_the_watchdog_where_graphs_hold_collectives(
    captures: bool, handling: str
) -> None:
    said = subprocess.run(
        [sys.executable, "-c", _JOIN.format(captures=captures)],
        env=os.environ | {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"},  # torchrun sets it
        stdout=subprocess.PIPE,
        text=True,
        timeout=90,
        check=True,
    )
    assert said.stdout.strip() == handling


def test_a_block_without_a_stream_runs_as_it_is() -> None:
    with on_stream(None):
        assert torch.ones(1).sum() == 1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("sync_bn", [True, False])
def test_a_captured_run_of_two_processes_has_the_losses_of_an_eager_one(
    tmp_path: Path, sync_bn: bool
) -> None:
    curves = []
    for captured in (False, True):
        tree = shared_tree(tmp_path / str(captured), sync_bn=sync_bn, tf32=False, device="cuda")
        tree["train"] |= {"iterations": 16, "log_every": 1, "eval_every": 16, "save_every": 16}
        tree["train"] |= {"graph": captured, "sync_check": True}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
        for process in launch("train", str(tmp_path / "run.yaml")):
            _, error = process.communicate(timeout=300)
            assert process.returncode == 0, error
        lines = (tmp_path / str(captured) / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        curves.append(torch.tensor([record["loss"] for record in records if "loss" in record]))
    assert len(curves[0]) == 16
    # Atomic additions of the backward pass make two runs drift apart.
    torch.testing.assert_close(curves[1][:12], curves[0][:12], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(curves[1], curves[0], rtol=2e-2, atol=1e-3)
