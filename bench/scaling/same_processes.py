"""Losses, prototypes and evaluation of one configuration on several numbers of processes.

python -m bench same-processes [CONFIG] [KEY.PATH=VALUE ...]
    [--processes 1,2,4] [--steps 50] [--json FILE]

On the CPU over gloo, in float64: training amplifies every rounding with each step, and pseudo-labels jump, so
that in float32 a last digit shows after ten steps. The contrast is computed, and its prototypes compared, but
lambda_c is 0, because each process draws its own anchors and negatives. After every step, all processes must
hold bitwise identical state. Exit status 1: a bound is exceeded.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import prcl_fast.engine.evaluate as evaluation
from bench.arguments import parser
from bench.compared_runs import ComparedRuns
from prcl_fast.config import Config, load_config, override_config
from prcl_fast.console.plain import PlainConsole
from prcl_fast.engine.trainer import Trainer
from prcl_fast.methods import Method
from prcl_fast.processes.replicas import check_alike

BOUND = 1e-5  # largest relative difference of a loss or prototype
SETTINGS = (
    "train.device=cpu",
    "train.amp=off",
    "train.threads=1",
    "data.workers=0",
    "train.batch_labeled=8",
    "train.batch_unlabeled=8",
    "method.lambda_c=0",
    "method.prototype=global",
    "method.delta_w=0.2",
    "method.delta_u=0.2",
)


def main(arguments: Sequence[str]) -> int:
    """`python -m bench same-processes`."""
    command = parser("same-processes", __doc__)
    command.add_argument("config", nargs="?", type=Path, default=Path("configs/demo.yaml"), metavar="CONFIG")
    command.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE")
    command.add_argument("--processes", default="1,2,4", metavar="N,N", help="numbers of processes")
    command.add_argument("--steps", type=int, default=50, help="of each run")
    command.add_argument("--json", type=Path, metavar="FILE", help="file for the result")
    options = command.parse_args(arguments)
    config = load_config(options.config, [*SETTINGS, *options.overrides])
    runs = ComparedRuns("prcl same processes 1", "cpu", options.steps, options.json)
    first: dict[str, Any] | None = None
    for processes in map(int, options.processes.split(",")):
        print(f"{processes} processes", file=sys.stderr, flush=True)
        found = trained(config, processes, options.steps)
        first = first or found
        row = {"processes": processes, "miou": found["miou"], **compared(first, found)}
        runs.add(
            row,
            f"{processes} processes: largest relative difference {row['losses']:.1e} of the losses of "
            f"{options.steps} steps, {row['prototypes']:.1e} of the prototypes after each; counts of the "
            f"evaluation {'equal' if row['same_counts'] else 'different'}, mIoU {row['miou']!r}",
        )
    held = all(
        row["losses"] <= BOUND and row["prototypes"] <= BOUND and row["same_counts"] for row in runs.rows
    )
    return int(not held)


def trained(config: Config, processes: int, steps: int) -> dict[str, Any]:
    """Losses and prototypes of each step, and the evaluation after the last, on `processes` processes.

    Returns:
        "losses" [steps, terms] and "prototypes" [steps, 2, C, D] (mean and variance), float64; "counts"
        [networks, C, C] int64; "miou" of the main network.
    """
    with tempfile.TemporaryDirectory(prefix="prcl_processes_") as folder:
        config = override_config(config, [f"output={folder}/run"])
        mp.spawn(_train, (config, processes, steps, folder), nprocs=processes)
        found: dict[str, Any] = torch.load(f"{folder}/found.pt", weights_only=True)
        return found


def compared(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Largest differences of two runs, relative for values above 1."""

    def difference(a: Tensor, b: Tensor) -> float:
        return float(((a - b).abs() / a.abs().clamp(min=1.0)).max())

    return {
        "losses": difference(one["losses"], other["losses"]),
        "prototypes": difference(one["prototypes"], other["prototypes"]),
        "same_counts": bool(torch.equal(one["counts"], other["counts"])),
    }


def _train(rank: int, config: Config, world: int, steps: int, folder: str) -> None:
    _compute_in_float64()
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    trainer = Trainer(config, PlainConsole(quiet=True))
    losses, prototypes = [], []
    with contextlib.closing(trainer.batches()) as batches:
        for _ in range(steps):
            named = trainer.step(batches)
            # Each process draws its own anchors and negatives, so the value of the contrast differs.
            losses.append(torch.stack([named[name] for name in sorted(named) if name != "loss_contrast"]))
            state = trainer.method.state_dict()
            check_alike(state)
            precision, weighted = state["contrast.precision"], state["contrast.weighted_mean"]
            known = precision > 0
            mean = torch.where(known, weighted / precision, 0.0)
            prototypes.append(torch.stack([mean, torch.where(known, 1 / precision, 0.0)]))
    results = evaluation.evaluate(
        trainer.method.networks(), trainer.source, config.data, config.eval, trainer.device
    )
    if rank == 0:
        found = {
            "losses": torch.stack(losses).double(),
            "prototypes": torch.stack(prototypes),
            "counts": torch.stack([torch.from_numpy(result.confusion) for result in results.values()]),
            "miou": next(iter(results.values())).miou,
        }
        torch.save(found, f"{folder}/found.pt")
    if world > 1:
        dist.destroy_process_group()


def _compute_in_float64() -> None:
    torch.set_default_dtype(torch.float64)
    in_float32, of_evaluation = Method.normalize, evaluation.normalize
    Method.normalize = lambda self, image: in_float32(self, image).double()  # type: ignore[method-assign]
    evaluation.normalize = lambda *arguments: of_evaluation(*arguments).double()
