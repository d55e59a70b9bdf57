"""Steps on several processes of this machine, and of one real rank among simulated ones."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from bench.ops.harness import percentile
from bench.scaling.process_groups import Meter, joined, simulated
from bench.scaling.traffic import NETWORKS, STATISTICS, Shape, gathering, shape_of
from bench.step.data import size_config
from prcl_fast.config import dump_config, parse_config
from prcl_fast.console.plain import PlainConsole
from prcl_fast.engine.trainer import Trainer
from prcl_fast.files.writing import write_text
from prcl_fast.losses import ProbabilisticContrast

WARMUP, STEPS, ROUNDS = 2, 5, 5  # steps, steps, and turns of each network
_SMALL = "small"  # a size of bench step
_HERE = ("train.device=cpu", "train.threads=1", "data.synthetic.unlabeled=16")
_MEASURED = ("train.batch_labeled=8", "train.batch_unlabeled=8")
# The public code's D, so that features are comparable to gradients; fewer anchors for short steps.
_SIMULATED = ("model.dim=256", "method.anchors=64", "method.negatives=128")


def measure(count: int) -> dict[str, Any]:
    """Measures steps of one global batch on `count` processes of this machine, with one thread each."""
    with tempfile.TemporaryDirectory(prefix="prcl_scaling_") as folder:
        config = size_config(_SMALL, Path(folder), [*_HERE, *_MEASURED])
        report = _on_processes(_train, count, Path(folder), dump_config(config))
    images = config.train.batch_labeled + config.train.batch_unlabeled
    return {"processes": count, "images": images} | report


def measure_contrast(shape: Shape) -> dict[str, Any]:
    """Bytes sent by one forward and backward pass of the contrast, on 2 processes with a random map each."""
    size = (shape.classes, shape.dim, shape.height, shape.width)
    with tempfile.TemporaryDirectory(prefix="prcl_scaling_") as folder:
        sent = _on_processes(_contrast, 2, Path(folder), size)
    return {"processes": 2, "classes": size[0], "dim": size[1], "map": size[2:], "collectives": sent}


def simulate(count: int) -> list[dict[str, Any]]:
    """Measures steps of one real process in a group of `count` simulated ones; 2 + 2 images for each."""
    ways = [(None, "ours"), *((network, what) for network in NETWORKS for what in ("ours", "gathering"))]
    if count == 1:
        ways = ways[:1]
    rows = [
        {"processes": count, "network": network and network.name, "what": what, "every_ms": []}
        for network, what in ways
    ]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prcl_scaling_")))
        batch = (f"train.batch_labeled={2 * count}", f"train.batch_unlabeled={2 * count}")
        config = size_config(_SMALL, folder, [*_HERE, *_SIMULATED, *batch])
        group = stack.enter_context(simulated(count))
        trainer = Trainer(config, PlainConsole(quiet=True))
        batches = stack.enter_context(contextlib.closing(trainer.batches()))
        instead = gathering(shape_of(config, len(trainer.source.classes)), (2, 2))
        for _ in range(WARMUP):
            trainer.step(batches)
        for _ in range(ROUNDS):
            for (network, what), row in zip(ways, rows, strict=True):
                group.network, group.instead = network, instead if what == "gathering" else None
                group.take()
                started = time.perf_counter()
                trainer.step(batches)
                trainer.stop.agreed()
                row["every_ms"].append(1e3 * (time.perf_counter() - started))
                passed, _ = group.take()
                if group.instead is not None:
                    passed = [one for one in passed if one.purpose != STATISTICS] + instead
                row["network_ms"] = 0.0 if network is None else 1e3 * network.seconds(passed, count)
    return [row | {"ms": percentile(row["every_ms"], 50)} for row in rows]


def _on_processes(work: Any, count: int, folder: Path, argument: Any) -> Any:
    """Runs `work` on `count` processes and returns the report of rank 0."""
    mp.spawn(work, (count, folder, argument), nprocs=count)
    return json.loads((folder / "report.json").read_text())


def _report(rank: int, folder: Path, report: Mapping[str, Any]) -> None:
    if rank == 0:
        write_text(folder / "report.json", json.dumps(report))


def _train(rank: int, count: int, folder: Path, tree: Mapping[str, Any]) -> None:
    config = parse_config(tree, "bench.scaling")
    times: list[float] = []
    waits: list[dict[str, float]] = []
    calls: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        meter = stack.enter_context(joined(rank, count, folder)) if count > 1 else None
        trainer = Trainer(config, PlainConsole(quiet=True))
        batches = stack.enter_context(contextlib.closing(trainer.batches()))
        for _ in range(WARMUP + STEPS):
            started = time.perf_counter()
            trainer.step(batches)
            trainer.stop.agreed()
            times.append(1e3 * (time.perf_counter() - started))
            if meter is not None:
                calls, waited = _taken(meter, count)
                waits.append(waited)
    times, waits = times[WARMUP:], waits[WARMUP:]
    waited_ms = {purpose: percentile([step.get(purpose, 0.0) for step in waits], 50) for purpose in calls}
    report = {
        "ms": percentile(times, 50),
        "ms_20": percentile(times, 20),
        "ms_80": percentile(times, 80),
        "every_ms": times,
        "collectives": calls,
        "waited_ms": waited_ms,
        "waited_share": sum(sum(step.values()) for step in waits) / sum(times),
    }
    _report(rank, folder, report)


def _contrast(rank: int, count: int, folder: Path, size: Sequence[int]) -> None:
    torch.set_num_threads(1)
    classes, dim, height, width = size
    torch.manual_seed(rank)
    mu = torch.randn(1, dim, height, width).contiguous(memory_format=torch.channels_last).requires_grad_()
    var = torch.rand_like(mu, requires_grad=False).mul_(0.9).add_(0.05)
    label = torch.randint(classes, (1, height, width))
    contrast = ProbabilisticContrast(classes, dim, tau=1.0)
    everywhere = torch.ones_like(label, dtype=torch.bool)
    with joined(rank, count, folder) as meter:
        loss = contrast(mu, var, label, everywhere, torch.rand(label.shape), torch.tensor([0, rank]))
        loss.backward()
        _report(rank, folder, _taken(meter, count)[0])


def _taken(meter: Meter, count: int) -> tuple[dict[str, Any], dict[str, float]]:
    """By purpose: calls, bytes given and bytes sent since the last call, and milliseconds waited."""
    passed, waited = meter.take()
    sums: dict[str, Any] = {}
    for one in passed:
        entry = sums.setdefault(one.purpose, {"calls": 0, "gives": 0, "sends": 0.0})
        entry["calls"] += 1
        entry["gives"] += one.gives
        entry["sends"] += one.sent(count)
    return sums, {purpose: 1e3 * seconds for purpose, seconds in waited.items()}
