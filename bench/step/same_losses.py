"""Losses of one configuration with and without each way of running it faster.

python -m bench same-losses [CONFIG] [KEY.PATH=VALUE ...] [--steps 200] [--only NAME,NAME] [--json FILE]

A cache or data workers must leave every loss bitwise identical. A compiled or captured step rounds
otherwise, and training amplifies the difference at every step. Such a run must agree in its first step. From
there on its bound is the distance between two plain runs whose first weights differ in their last digit. On
CUDA two equal runs may differ as well (atomic additions, convolutions chosen by their time). A second plain
run measures that distance; if it is not 0, no run is held to bitwise identity. Exit status 1: a bound is
exceeded.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.arguments import parser
from bench.compared_runs import ComparedRuns
from prcl_fast.config import Config, load_config, override_config
from prcl_fast.console.plain import PlainConsole
from prcl_fast.device import choose_device
from prcl_fast.engine.trainer import Trainer

WINDOW = 20  # steps of a mean
ROUNDING = 1e-4  # relative difference that is always allowed, unless losses must be identical
TIMES_CONTROL = 2.0  # tolerance, as a multiple of the control runs' distance
NUDGED, AGAIN = "last digit", "again"  # the controls
PLAIN = ("data.cache=none", "data.workers=0", "train.compile=false", "train.graph=false")
_KEYS = ("first", "windows", "whole")  # of a comparison
# Name, overrides, and whether losses must be bitwise identical.
VARIANTS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("cache-ram", ("data.cache=ram",), True),
    ("cache-disk", ("data.cache=disk",), True),
    ("workers", ("data.workers=2",), True),
    ("compile", ("train.compile=true",), False),
)
CUDA_VARIANTS = (
    ("graph", ("train.graph=true",), False),
    ("graph-compile", ("train.graph=true", "train.compile=true"), False),
)


def main(arguments: Sequence[str]) -> int:
    """`python -m bench same-losses`."""
    command = parser("same-losses", __doc__)
    command.add_argument("config", nargs="?", type=Path, default=Path("configs/demo.yaml"), metavar="CONFIG")
    command.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE")
    command.add_argument("--steps", type=int, default=200, help="of each run")
    command.add_argument("--only", metavar="NAME,NAME", help="variants to run")
    command.add_argument("--json", type=Path, metavar="FILE", help="file for the result")
    options = command.parse_args(arguments)
    config = load_config(options.config, [*PLAIN, *options.overrides])
    device = choose_device(config.train.device)
    variants = [*VARIANTS, *(CUDA_VARIANTS if device.type == "cuda" else ())]
    if options.only:
        variants = [variant for variant in variants if variant[0] in options.only.split(",")]
    runs = ComparedRuns("prcl same losses 1", device.type, options.steps, options.json)
    print("plain", file=sys.stderr, flush=True)
    plain = losses(config, options.steps)
    controls = [NUDGED, *([AGAIN] if device.type == "cuda" else [])]
    for name, overrides, exact in [*((control, (), False) for control in controls), *variants]:
        print(name, file=sys.stderr, flush=True)
        other = losses(override_config(config, overrides), options.steps, nudged=name == NUDGED)
        row = {"variant": name, "overrides": overrides, "exact": exact, **compared(plain, other)}
        torch.compiler.reset()
        runs.add(
            row,
            f"{name}: {row['equal_steps']} of {options.steps} steps bitwise identical; largest relative "
            f"difference {row['first']:.1e} in the first step, {row['windows']:.1e} of means over {WINDOW} "
            f"steps, {row['whole']:.1e} of the mean over all",
        )
    known = runs.rows[: len(controls)]
    wrong = [row["variant"] for row in runs.rows[len(controls) :] if not held(row, known)]
    if wrong:
        print(f"bench same-losses: beyond the bounds: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


def held(row: dict[str, Any], controls: Sequence[dict[str, Any]]) -> bool:
    """Whether a run is within its bounds of the plain one.

    Args:
        controls: rows of the nudged run and, on a device where equal runs may differ, of a second plain run.
    """
    deterministic = all(_is_equal(control) for control in controls if control["variant"] == AGAIN)
    if row["exact"] and deterministic:
        return _is_equal(row)
    return all(
        row[key] <= max(ROUNDING, TIMES_CONTROL * max(control[key] for control in controls)) for key in _KEYS
    )


def _is_equal(row: dict[str, Any]) -> bool:
    return all(row[key] == 0 for key in _KEYS)


def losses(config: Config, steps: int, *, nudged: bool = False) -> Tensor:
    """[steps, terms] float64: the named losses of the first steps of a run.

    Args:
        nudged: start from classifier weights that are changed in their last digit.
    """
    with tempfile.TemporaryDirectory(prefix="prcl_losses_") as folder:
        config = override_config(config, [f"output={folder}/run", f"data.cache_dir={folder}"])
        trainer = Trainer(config, PlainConsole(quiet=True))
        if nudged:
            nudge(trainer)
        rows = []
        with contextlib.closing(trainer.batches()) as batches:
            for _ in range(steps):
                found = trainer.step(batches)
                rows.append(torch.stack([found[name] for name in sorted(found)]))
        return torch.stack(rows).double().cpu()


@torch.no_grad()
def nudge(trainer: Trainer) -> None:
    """Changes the classifier's weights in their last digit."""
    for weight in trainer.method.student.classifier.parameters():
        weight.mul_(1 + torch.finfo(weight.dtype).eps)


def compared(plain: Tensor, other: Tensor, window: int = WINDOW) -> dict[str, Any]:
    """Largest relative differences of two runs over all terms.

    Args:
        plain, other: [steps, terms].
        window: steps over which the means for "windows" are taken.
    """

    def difference(a: Tensor, b: Tensor) -> float:
        return float(((a - b).abs() / a.abs().clamp(min=1e-6)).max())

    window = min(window, len(plain))
    means, other_means = (x.unfold(0, window, window).mean(-1) for x in (plain, other))
    return {
        "equal_steps": int((plain == other).all(1).sum()),
        "first": difference(plain[:1], other[:1]),
        "windows": difference(means, other_means),
        "whole": difference(plain.mean(0), other.mean(0)),
    }
