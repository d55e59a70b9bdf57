"""The benchmarks by name: `python -m bench NAME ...`."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence

from prcl_fast.console import check_known, run

# The module of each command, whose `main` takes the arguments, and a line of help.
COMMANDS = {
    "ops": ("bench.ops.command", "time, memory and error of each op and of the whole contrast"),
    "step": ("bench.step.command", "the training step against the published one and plain PyTorch"),
    "step-profile": ("bench.step.profile", "time, memory and kernels of the package's own step"),
    "memory-bank": ("bench.step.memory_bank", "the contrast with virtual negatives or a memory bank"),
    "same-losses": ("bench.step.same_losses", "losses with cache, workers, compile and graph against none"),
    "scaling": ("bench.scaling.command", "bytes and time of a step on several processes"),
    "same-processes": ("bench.scaling.same_processes", "losses and mIoU on 1, 2 and 4 processes"),
    "gpu": ("bench.gpu.command", "tests, memory checks and benchmarks on a machine with a GPU"),
    "gpu-bundle": ("bench.gpu.bundle", "one file with which a GPU machine without a network runs `gpu`"),
    "gpu-sanitize": ("bench.gpu.sanitize", "every op on small odd shapes, under compute-sanitizer"),
    "gpu-facts": ("bench.gpu.facts", "GPU, versions, packages and tools of this machine as JSON"),
}


def main(arguments: Sequence[str]) -> int:
    """Runs `NAME ...` and returns the exit status; a mistake in the input is one line and status 2."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    name, *rest = arguments
    status = run(lambda: check_known("command", [name], COMMANDS), "bench")
    if status:
        return status
    module, _ = COMMANDS[name]
    with _needed(name):
        return run(lambda: importlib.import_module(module).main(rest), f"bench {name}")


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    usage = "usage: python -m bench NAME [ARGUMENT]..., with --help for the arguments of one\n"
    return "\n".join([usage, *lines])


@contextlib.contextmanager
def _needed(name: str) -> Iterator[None]:
    """A package that is not installed ends the command with one line and status 2.

    The ops and their checks run without most of the package's dependencies; training does not.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in ("", "bench", "prcl_fast"):
            raise
        print(f"bench {name}: needs the package {package}, which is not installed", file=sys.stderr)
        sys.exit(2)
