"""Trains one configuration with and without each way of running it faster, and compares the losses.

python -m bench.same_losses [CONFIG] [KEY.PATH=VALUE ...] [--steps 200] [--only NAME,NAME] [--json FILE]

Where images come from must not change a bit. A compiled or captured step rounds otherwise, and what a step
rounds otherwise the next ones carry on: means over WINDOW steps are compared there. Exit status 1 where a
bound is exceeded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from bench import machine
from prcl_fast.config import Config, load_config, override_config
from prcl_fast.data.atomic import write_text
from prcl_fast.device import choose_device
from prcl_fast.engine.trainer import Trainer
from prcl_fast.errors import InputError

WINDOW = 20  # steps
ROUNDING_BOUND = 0.05  # relative difference of the means over a window
# Name, overrides, and whether not a bit may change.
VARIANTS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("cache-ram", ("data.cache=ram",), True),
    ("cache-disk", ("data.cache=disk",), True),
    ("no-workers", ("data.workers=0",), True),
    ("compile", ("train.compile=true",), False),
)
CUDA_VARIANTS = (
    ("graph", ("train.graph=true",), False),
    ("graph-compile", ("train.graph=true", "train.compile=true"), False),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", help="names of variants")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    config = load_config(options.config, options.overrides)
    device = choose_device(config.train.device)
    variants = [*VARIANTS, *(CUDA_VARIANTS if device.type == "cuda" else ())]
    if options.only:
        variants = [variant for variant in variants if variant[0] in options.only.split(",")]
    result: dict[str, Any] = {
        "kind": "prcl same losses 1",
        "machine": machine.describe(device.type),
        "steps": options.steps,
        "rows": [],
    }
    print("plain", file=sys.stderr, flush=True)
    plain = losses(config, options.steps)
    for name, overrides, exact in variants:
        print(name, file=sys.stderr, flush=True)
        row = compared(plain, losses(override_config(config, overrides), options.steps), exact=exact)
        result["rows"].append({"variant": name, "overrides": overrides, **row})
        torch.compiler.reset()
        if options.json is not None:
            write_text(options.json, json.dumps(result, indent=1) + "\n")
        print(
            f"{name}: {row['equal_steps']} of {options.steps} steps equal bit for bit; largest relative "
            f"difference {row['first_steps']:.1e} in the first 5 steps, {row['windows']:.1e} of means over "
            f"{WINDOW} steps, {row['bound']:g} allowed"
        )
    return int(any(row["windows"] > row["bound"] for row in result["rows"]))


def losses(config: Config, steps: int) -> Tensor:
    """[steps, terms] float64: the named losses of the first steps of a run."""
    with tempfile.TemporaryDirectory(prefix="prcl_losses_") as folder:
        config = config.model_copy(update={"output": Path(folder) / "run"})
        trainer = Trainer(config, Console(quiet=True))
        rows = []
        with contextlib.closing(trainer.batches()) as batches:
            for _ in range(steps):
                found = trainer.step(batches)
                rows.append(torch.stack([found[name] for name in sorted(found)]))
        return torch.stack(rows).double().cpu()


def compared(plain: Tensor, other: Tensor, *, exact: bool) -> dict[str, Any]:
    """How far two runs are apart."""

    def difference(a: Tensor, b: Tensor) -> float:
        return float(((a - b).abs() / a.abs().clamp(min=1e-6)).max())

    window = min(WINDOW, len(plain))
    means, other_means = (x.unfold(0, window, window).mean(-1) for x in (plain, other))
    return {
        "equal_steps": int((plain == other).all(1).sum()),
        "first_steps": difference(plain[:5], other[:5]),
        "windows": difference(means, other_means),
        "bound": 0.0 if exact else ROUNDING_BOUND,
        "exact": exact,
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        print(f"same_losses: {error}", file=sys.stderr)
        sys.exit(2)
