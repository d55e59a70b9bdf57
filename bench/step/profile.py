"""Time and profile of the package's own training step: its milliseconds, its memory and its kernels.

python -m bench step-profile OUT.json [SIZE] [KEY=VALUE ...]

SIZE is small (the default), voc or cityscapes. OUT.json is written after every stage, so that a run that is
stopped early leaves a result. On a CPU operators are listed in place of kernels.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from bench import machine
from bench.arguments import parser
from bench.ops.run import write_result
from bench.step.data import SIZES, size_config
from prcl_fast.console.plain import PlainConsole
from prcl_fast.data.batches import Batch
from prcl_fast.engine.trainer import Trainer

KIND = "prcl step profile 1"
SHOWN = 45  # kernels on standard output; the file has all of them
_TURNS = 4
_TRACED = 3  # steps under the profiler


def profile_step(
    size: str, overrides: Sequence[str], finished: Callable[[dict[str, Any]], None] = lambda result: None
) -> dict[str, Any]:
    """Profiles the first training steps of a size's configuration, whose output is discarded.

    Args:
        size: one of SIZES.
        overrides: changes of the configuration, KEY=VALUE.
        finished: called with the result so far after every stage.

    Returns:
        `kind`, `machine`, `size` and `overrides`; `first_step_ms`, which includes compilation and capture;
        of each turn, `ms` of a step and `host_ms` until its last kernel was issued; `losses` of the last
        step; on CUDA `peak_gb` of the tensors; `kernels`, the slowest first, each with its `name`, and its
        `ms` and `calls` in a step; their sums `kernel_ms` and `launches`.

    Raises:
        InputError: the configuration is wrong.
    """
    with tempfile.TemporaryDirectory(prefix="prcl_step_profile_") as folder:
        trainer = Trainer(size_config(size, Path(folder), overrides), PlainConsole(quiet=True))
        cuda = trainer.device.type == "cuda"
        result: dict[str, Any] = {
            "kind": KIND,
            "machine": machine.describe(trainer.device.type),
            "size": size,
            "overrides": list(overrides),
        }
        with contextlib.closing(trainer.batches()) as batches:
            result["first_step_ms"] = _timed(trainer, batches, 1)[0]
            finished(result)
            _timed(trainer, batches, 9 if cuda else 1)
            turns = [_timed(trainer, batches, 10 if cuda else 1) for _ in range(_TURNS)]
            result["ms"] = [ms for ms, _, _ in turns]
            result["host_ms"] = [host_ms for _, host_ms, _ in turns]
            result["losses"] = turns[-1][2]
            if cuda:
                result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            finished(result)
            result["kernels"] = _kernels(trainer, batches)
            result["kernel_ms"] = sum(row["ms"] for row in result["kernels"])
            result["launches"] = sum(row["calls"] for row in result["kernels"])
            finished(result)
    return result


def report(result: dict[str, Any], shown: int = SHOWN) -> list[str]:
    """The lines to print of a result of `profile_step`."""
    turns = ", ".join(f"{ms:.1f}" for ms in result["ms"])
    host = ", ".join(f"{ms:.1f}" for ms in result["host_ms"])
    peak = f"; peak {result['peak_gb']:.1f} GB" if "peak_gb" in result else ""
    what = " ".join([result["size"], *result["overrides"]])
    return [
        f"{result['machine']['device']}: {what}: {turns} ms a step; host {host} ms; "
        f"first step {result['first_step_ms'] / 1e3:.1f} s{peak}",
        "losses " + ", ".join(f"{name} {value:.4g}" for name, value in result["losses"].items()),
        f"{result['kernel_ms']:.2f} ms in {result['launches']:.0f} launches a step",
        *(
            f"{row['ms']:8.3f} ms {row['calls']:6.0f}x {row['name'][:110]}"
            for row in result["kernels"][:shown]
        ),
    ]


def _timed(trainer: Trainer, batches: Iterator[Batch], steps: int) -> tuple[float, float, dict[str, float]]:
    """Milliseconds of a step, milliseconds until all kernels were issued, and losses of the last step."""
    _synchronize(trainer.device)
    start = time.perf_counter()
    for _ in range(steps):
        losses = trainer.step(batches)
    issued = time.perf_counter()
    _synchronize(trainer.device)
    end = time.perf_counter()
    values = {name: float(value) for name, value in losses.items()}
    return 1e3 * (end - start) / steps, 1e3 * (issued - start) / steps, values


def _kernels(trainer: Trainer, batches: Iterator[Batch]) -> list[dict[str, Any]]:
    cuda = trainer.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        _timed(trainer, batches, _TRACED)
    rows = []
    for event in profiler.key_averages():
        # A named range, such as the optimiser's step, spans kernels that have rows of their own.
        if cuda and (event.device_type != DeviceType.CUDA or event.is_user_annotation):
            continue
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        if microseconds > 0:
            calls = event.count / _TRACED
            rows.append({"name": event.key, "ms": microseconds / _TRACED / 1e3, "calls": calls})
    return sorted(rows, key=lambda row: -row["ms"])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(arguments: Sequence[str]) -> None:
    """`python -m bench step-profile`."""
    command = parser("step-profile", __doc__)
    command.add_argument("out", type=Path, metavar="OUT.json", help="file for the result")
    command.add_argument("size", nargs="?", default="small", choices=SIZES, metavar="SIZE")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of the configuration")
    options = command.parse_args(arguments)
    result = profile_step(options.size, options.overrides, lambda so_far: write_result(so_far, options.out))
    print(*report(result), sep="\n", flush=True)
