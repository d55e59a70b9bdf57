"""Trains one configuration with and without each way of running it faster, and compares the losses.

python -m bench.step.same_losses [CONFIG] [KEY.PATH=VALUE ...] [--steps 200] [--only NAME,NAME] [--json FILE]

Where images come from must not change a bit. A compiled or captured step rounds otherwise, and training makes
more of it at every step: such a run is held to its first step, and from there on to how far apart two plain
runs come whose first weights differ in their last digit. On CUDA two equal runs may differ as well (atomic
additions, convolutions chosen by their time): a second plain run shows by how much, and if it does, nothing
is held to the bit. Exit status 1 where a bound is exceeded.
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

from bench.packages import needed

with needed("bench.step.same_losses" if __name__ == "__main__" else None):
    import torch
    from rich.console import Console
    from torch import Tensor

    from bench import machine
    from prcl_fast.config import Config, load_config, override_config
    from prcl_fast.device import choose_device
    from prcl_fast.engine.trainer import Trainer
    from prcl_fast.errors import InputError
    from prcl_fast.files.writing import write_text

WINDOW = 20  # steps, over which means are taken
ROUNDING = 1e-4  # a relative difference that is never too large, unless not a bit may change
TIMES_CONTROL = 2.0  # how much further than the controls a run may come from the plain one
NUDGED, AGAIN = "last digit", "again"  # the controls
PLAIN = ("data.cache=none", "data.workers=0", "train.compile=false", "train.graph=false")
_KEYS = ("first", "windows", "whole")  # of a comparison
# Name, overrides, and whether not a bit may change.
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", help="names of variants")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    config = load_config(options.config, [*PLAIN, *options.overrides])
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
    controls = [NUDGED, *([AGAIN] if device.type == "cuda" else [])]
    for name, overrides, exact in [*((control, (), False) for control in controls), *variants]:
        print(name, file=sys.stderr, flush=True)
        other = losses(override_config(config, overrides), options.steps, nudged=name == NUDGED)
        row = {"variant": name, "overrides": overrides, "exact": exact, **compared(plain, other)}
        result["rows"].append(row)
        torch.compiler.reset()
        if options.json is not None:
            write_text(options.json, json.dumps(result, indent=1) + "\n")
        print(
            f"{name}: {row['equal_steps']} of {options.steps} steps equal bit for bit; largest relative "
            f"difference {row['first']:.1e} in the first step, {row['windows']:.1e} of means over {WINDOW} "
            f"steps, {row['whole']:.1e} of the mean over all",
            flush=True,
        )
    known = result["rows"][: len(controls)]
    wrong = [row["variant"] for row in result["rows"][len(controls) :] if not held(row, known)]
    if wrong:
        print(f"same_losses: beyond the bounds: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


def held(row: dict[str, Any], controls: Sequence[dict[str, Any]]) -> bool:
    """Whether a run is as near to the plain one as it must be.

    Args:
        controls: how far from it runs came that may differ: the nudged one, and on a device where equal runs
            may differ another plain one.
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
        nudged: begin with the classifier's weights changed in their last digit.
    """
    with tempfile.TemporaryDirectory(prefix="prcl_losses_") as folder:
        config = override_config(config, [f"output={folder}/run", f"data.cache_dir={folder}"])
        trainer = Trainer(config, Console(quiet=True))
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
    """How far two runs are apart: the largest relative difference of any term.

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


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        print(f"same_losses: {error}", file=sys.stderr)
        sys.exit(2)
