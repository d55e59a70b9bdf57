"""Fuzzing of the command line: `PYTHONPATH=tests python tests/fuzz/fuzzing.py --count 3000 --seed 7`.

Each input is a function of its kind, its number and the files in `corpus`. For every input, the command
must end by itself: with success, or with one line that names the input.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import typer
from fuzz_bytes import Case
from fuzz_meaning import labels, settings
from fuzz_pixels import image, mask
from fuzz_places import CACHED, caches, photos, run_files
from fuzz_tensors import checkpoint, weights
from fuzz_text import configuration, split
from rich.console import Console
from torch import nn

from prcl_fast.cli import main as main_module
from prcl_fast.config import Config, parse_config
from prcl_fast.engine import trainer as trainer_module
from prcl_fast.engine.trainer import Trainer
from prcl_fast.methods import build_method
from prcl_fast.models import resnet
from prcl_fast.models.weights import save_network
from prcl_fast.runs.checkpoint import load_checkpoint, save_checkpoint
from support.tiny import tiny_tree

KINDS: dict[str, Callable[[random.Random, Path], Case]] = {
    "configurations": configuration,
    "splits": split,
    "masks": mask,
    "images": image,
    "checkpoints": checkpoint,
    "weights": weights,
    "labels": labels,
    "settings": settings,
    "photos": photos,
    "run_files": run_files,
    "caches": caches,
}
OF_RUNS = ("checkpoints", "weights", "photos", "run_files")  # kinds that spoil a finished run, not a data set
CORPUS = Path(__file__).parent / "corpus"
SECONDS = 20
MEMORY = 3 * 2**30


class ThinBlock(nn.Conv2d):
    """A residual block of one 1x1 convolution: with it a checkpoint has 5 MB instead of 130."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, *_: Any) -> None:
        super().__init__(in_channels, channels, 1, stride, bias=False)


class Accepted(BaseException):
    """The command accepted its input and made one step."""


class Hung(BaseException):
    """The command did not end within SECONDS."""


@contextlib.contextmanager
def harness() -> Iterator[Path]:
    """The folder of base files; inside the block, networks are thin and `prcl train` makes one step."""
    thin = mock.patch.dict(resnet.BLOCKS, {18: (ThinBlock, (1, 1, 1, 1))})
    one_step = mock.patch.object(trainer_module, "Trainer", _one_step)
    # A number of threads from a file would also apply to the inputs after it.
    threads = mock.patch.object(torch, "set_num_threads")
    built_once = mock.patch.object(main_module, "app", typer.main.get_command(main_module.app))
    with thin, one_step, threads, built_once, tempfile.TemporaryDirectory() as place, _bounded_memory():
        folder, former = Path(place), os.getcwd()
        cache = mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(folder / "cache")})
        try:
            cache.start()
            shutil.copytree(CORPUS / "data", folder / "files")
            _write_tensor_files(folder / "tensors")
            os.chdir(folder)
            yield folder
        finally:
            os.chdir(former)
            cache.stop()


def _write_tensor_files(folder: Path) -> None:
    (folder / "run").mkdir(parents=True)
    tree = tiny_tree(Path("run"))
    tree["data"]["synthetic"] |= {"val": 1}
    tree["train"] |= {"iterations": 2}
    (folder / "run.yaml").write_text(str(tree))  # a printed tree is YAML as well
    config = parse_config(tree | {"output": str(folder.parent / "trained")}, "run.yaml")
    Trainer(config, Console(quiet=True)).run()
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(config.output / name, folder / "run")
    state = load_checkpoint(config.output / "last.pt")
    save_checkpoint(folder / "run" / "last.pt", state | {"iteration": 1})  # a step is left to do
    method = build_method(config, 6)
    torch.save(method.student.backbone.state_dict(), folder / "backbone.pth")
    save_network(method.student.state_dict(), 6, folder / "network.pth")


def _one_step(config: Config, *arguments: Any, **named: Any) -> None:
    model, train, data = config.model, config.train, config.data
    small = max(*data.crop, model.width, model.dim, train.batch_labeled, train.batch_unlabeled) <= 256
    if not small or data.workers or max(data.synthetic.size) > 128:
        raise Accepted  # it can need more memory and processes than a test should take
    made = Trainer(config, *arguments, **named)
    with contextlib.closing(made.batches()) as batches:
        made.step(batches)
    raise Accepted


@contextlib.contextmanager
def _bounded_memory() -> Iterator[None]:
    """Limits this process to MEMORY more bytes than it has: an input that needs all memory fails here."""
    former = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, former)


def check(kind: str, number: int, folder: Path) -> str | None:
    """Spoils a copy of the base files, runs the command, and describes a wrong end of it."""
    place = folder / "input"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder / ("tensors" if kind in OF_RUNS else "files"), place)
    os.chdir(place)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    if kind == "caches":
        _run(CACHED)
    case = KINDS[kind](random.Random(f"{kind} {number}"), place)
    written = [place / name for name in case.written]
    before = _contents(place, written)
    # A whole run writes all its files; any other input is spent after one step.
    trainer = Trainer if kind == "run_files" else trainer_module.Trainer
    with mock.patch.object(trainer_module, "Trainer", trainer):
        status, said = _run(case.arguments)
    if status not in (0, 1, 2) or "Traceback" in said:
        return f"status {status}: {said}"
    # The opening line of a run begins with the name of its method.
    lines = [
        line for line in said.splitlines() if line.startswith("prcl: ") and " M parameters, " not in line
    ]
    many = case.arguments[0] == "predict"  # which names every bad image, and then their number
    if status and (not lines or (len(lines) > 1 and not many) or said.splitlines()[-1] != lines[-1]):
        return f"not one line, the last: {said}"
    if status and not any(name in lines[0] for name in case.named):
        return f"names none of {case.named}: {lines[0]}"
    after = _contents(place, written)
    changed = sorted(name for name in before | after if after.get(name) != before.get(name))
    if changed:
        return f"changed {changed}"
    left = [str(path) for path in folder.rglob("*.tmp")]
    if left or (place / "intruded").exists():
        return f"left behind: {left or 'what code from a file has made'}"
    if (place / "out").exists() and not (place / "out" / "config.yaml").is_file():
        return "half an output"
    return None


def _contents(folder: Path, written: list[Path]) -> dict[str, bytes]:
    """The bytes of every input file, without what the command may write."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not any(path.is_relative_to(own) for own in written)
    }


def _run(arguments: list[str]) -> tuple[int, str]:
    """Exit status and standard error of a command; -1 and the traceback where it raised an exception."""

    def hung(*_: object) -> None:
        raise Hung

    said = io.StringIO()
    former = signal.signal(signal.SIGALRM, hung)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with (
            mock.patch.object(sys, "argv", ["prcl", *arguments]),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(said),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            main_module.main()
    except Accepted:
        return 0, said.getvalue()
    except SystemExit as end:
        return (end.code if isinstance(end.code, int) else int(end.code is not None)), said.getvalue()
    except BaseException:
        # An exception may print a tensor.
        return -1, "\n".join([*traceback.format_exc(limit=-3).splitlines()[:10], "..."])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    return 0, said.getvalue()


def known_seeds() -> list[tuple[str, int]]:
    """The inputs that once failed, from `corpus/seeds.txt`: kind, number, description."""
    lines = (CORPUS / "seeds.txt").read_text().splitlines()
    return [(line.split()[0], int(line.split()[1])) for line in lines if line]


def run_many(inputs: list[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """The failures, by input."""
    with harness() as folder:
        found = {(kind, number): check(kind, number, folder) for kind, number in inputs}
    return {key: fault for key, fault in found.items() if fault is not None}


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="how many inputs")
    parser.add_argument("--seed", type=int, default=0, help="number of the first input of each kind")
    parser.add_argument("--kind", choices=KINDS, help="one kind instead of all")
    options = parser.parse_args()
    kinds = [options.kind] if options.kind else list(KINDS)
    inputs = [(kinds[i % len(kinds)], options.seed + i // len(kinds)) for i in range(options.count)]
    faults = run_many(inputs)
    for (kind, number), fault in faults.items():
        print(f"{kind} {number}: {fault}")
    print(f"{len(inputs)} inputs, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(_main())
