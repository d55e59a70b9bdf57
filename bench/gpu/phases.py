"""The two sets of phases, the most important first, for a machine that is available for minutes.

Without a GPU a phase runs in its small form on the CPU, which tests everything around it; a phase without a
small form is skipped.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.gpu.runner import NO_GPU, Phase

_ROOT = Path(__file__).resolve().parents[2]
_PYTHON = sys.executable
_FOUND_SOMETHING = 9  # exit status asked of compute-sanitizer
# One line for each finished test, so that the log of a phase that is cut off names failures.
_PYTEST = ("-m", "pytest", "-vv", "-p", "no:cacheprovider", "--tb=line", "-rf", "--timeout=60")
# A test file whose package is missing must not stop the others.
_WITHOUT_SOME = "--continue-on-collection-errors"
_SMALL_STEP = (
    "train.threads=1", "train.batch_labeled=2", "train.batch_unlabeled=2", "model.width=16", "model.dim=8",
    "method.anchors=16", "method.negatives=16",
)  # fmt: skip
_ON_CPU = {"OMP_NUM_THREADS": "1"}  # barriers between threads are slow on a shared machine


def facts_phase(folder: Path) -> Phase:
    """The machine: GPU, versions, packages, tools, and whether the native library loads."""
    command = (*_bench("gpu-facts"), str(folder / "facts.json"))
    return Phase("facts", 60, command, "the machine has what the other phases need")


def first(folder: Path, facts: dict[str, Any]) -> list[Phase]:
    """Correctness of the ops, and the profile of the whole step."""
    of = _Phases(folder, facts)
    return [
        of.build(),
        of.command("smoke", 45, "every op runs, at odd shapes", "gpu-sanitize", _native(), _cpu(_native())),
        of.step("step", 100, "the time of a training step by kernel", lines=49),
        of.bench("probabilistic_info_nce", 50, ("eager", "native", "native-shared16")),
        of.bench("contrast", 50, ("eager", "native", "native-shared16"), on_cpu=False),
        of.tests("native_tests", 70, "the kernels agree with float64 at all shapes", "native"),
        of.sanitizer("memcheck"),
    ]


def second(folder: Path, facts: dict[str, Any]) -> list[Phase]:
    """Faster ways of running the step, races, and native against Triton."""
    of = _Phases(folder, facts)
    step = ("--candidates", "ours,eager", "--rounds", "4", "--json", of.result("bench_step"))
    small = ("--candidates", "ours", "--rounds", "1", "--json", of.result("bench_step"), *_SMALL_STEP)
    losses = ("--steps", "60", "--only", "graph", "--json", of.result("same_losses"))
    return [
        of.build(),
        of.step("graph", 60, "a captured step works; the cost of launches", "train.graph=true", lines=4),
        of.step("compile", 130, "the gain by fusion", "train.compile=true", lines=29),
        of.captured(),
        of.sanitizer("racecheck"),
        of.bench(
            "native_triton", 60, ("native", "triton"),
            ops=("prototype_statistics", "sample_negatives", "probabilistic_info_nce", "pseudo_label",
                 "upsample_cross_entropy"),
        ),
        of.ncu(),
        of.tests("triton_tests", 60, "the Triton kernels agree with float64", "triton"),
        of.command("bench_step", 80, "the package's step against plain PyTorch", "step",
                  ("--size", "voc", *step), ("--size", "small", *small)),
        of.command("same_losses", 60, "a captured step trains like an eager one", "same-losses", losses),
    ]  # fmt: skip


Set = Callable[[Path, dict[str, Any]], Sequence[Phase]]
SETS: dict[str, Set] = {"first": first, "second": second}


class _Phases:
    """Phases for a machine with these `facts`."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder, self.facts = folder, facts
        self.cuda = facts.get("gpu", "unknown") is not None

    def result(self, name: str) -> str:
        return str(self.folder / f"{name}.json")

    def phase(
        self,
        name: str,
        limit: float,
        verifies: str,
        command: Sequence[str],
        *,
        on_cpu: Sequence[str] | None = None,
        tools: Sequence[str] = (),
        lines: int = 4,
        **environment: str,
    ) -> Phase:
        """A phase; `on_cpu` is its small form, without which it needs a GPU."""
        if not self.cuda:
            skipped = NO_GPU if on_cpu is None else None
            return Phase(name, limit, on_cpu or command, verifies, skipped, _ON_CPU | environment, lines)
        missing = [tool for tool in tools if shutil.which(tool) is None]
        skipped = f"{missing[0]} is not installed" if missing else None
        return Phase(name, limit, command, verifies, skipped, environment, lines)

    def command(
        self,
        name: str,
        limit: float,
        verifies: str,
        command: str,
        arguments: Sequence[str],
        on_cpu: Sequence[str] | None = None,
    ) -> Phase:
        """One of `bench.commands`."""
        small = None if on_cpu is None else (*_bench(command), *on_cpu)
        return self.phase(name, limit, verifies, (*_bench(command), *arguments), on_cpu=small)

    def build(self) -> Phase:
        """For this GPU alone: a third of the time."""
        command = (_PYTHON, "-W", "ignore", "setup.py", "-q", "build_ext", "--inplace")
        if self.cuda and self.facts.get("native", "unknown") is None:
            why = "the bundled library runs on this GPU"
            return Phase("build", 90, command, "", why)
        return self.phase(
            "build", 90, "the native library can be built here", command, tools=("nvcc", "g++"),
            TORCH_CUDA_ARCH_LIST=str(self.facts.get("capability")), FORCE_CUDA="1",
        )  # fmt: skip

    def step(self, name: str, limit: float, verifies: str, *overrides: str, lines: int) -> Phase:
        out = (*_bench("step-profile"), self.result(name))
        # A step on a CPU is neither captured nor compiled within its time limit.
        on_cpu = None if overrides else (*out, "small", *_SMALL_STEP)
        return self.phase(name, limit, verifies, (*out, "voc", *overrides), on_cpu=on_cpu, lines=lines)

    def bench(
        self,
        name: str,
        limit: float,
        candidates: Sequence[str],
        ops: Sequence[str] = (),
        on_cpu: bool = True,
    ) -> Phase:
        out = ("--json", self.result(name))
        run = (*_bench("ops"), *(ops or (name,)), "--candidates", ",".join(candidates), *out)
        small = (*_bench("ops"), (ops or (name,))[0], "--candidates", "native", *out)
        return self.phase(
            name,
            limit,
            f"time and error of {', '.join(candidates)}",
            (*run, "--device", "cuda", "--size", "voc", "--dtype", "bfloat16", "--rounds", "7"),
            on_cpu=(*small, "--device", "cpu", "--size", "small", "--rounds", "1") if on_cpu else None,
        )

    def pytest(
        self,
        name: str,
        limit: float,
        verifies: str,
        run: Sequence[str],
        small: Sequence[str],
        **environment: str,
    ) -> Phase:
        """Tests, of which at least one must run."""
        pytest = (_PYTHON, *_PYTEST, f"--junitxml={self.folder / name}.xml")
        phase = self.phase(
            name, limit, verifies, (*pytest, "-m", "gpu", *run), on_cpu=(*pytest, "-m", "not gpu", *small),
            lines=12, **environment,
        )  # fmt: skip
        return replace(phase, expects=" passed")

    def tests(self, name: str, limit: float, verifies: str, backend: str) -> Phase:
        run = (_WITHOUT_SOME, "-k", f"cuda-{backend}", "-n", "8", *op_tests())
        small = ("-k", f"cpu-{backend} and not compile", "tests/ops/test_philox_normal.py")
        # Only this place: others would first compile the emulated kernels.
        place = f"{'cuda' if self.cuda else 'cpu'}-{backend}"
        return self.pytest(name, limit, verifies, run, small, PRCL_TEST_PLACE=place)

    def captured(self) -> Phase:
        files = ("tests/engine/test_step.py", "tests/data/test_prefetch.py")
        verifies = "captured steps equal eager ones; prefetched batches free their memory"
        small = ("-k", "consumer or mean_teacher", *files)
        return self.pytest("captured", 60, verifies, ("-n", "6", *files), small)

    def sanitizer(self, tool: str) -> Phase:
        """Checks the package's own kernels alone: PyTorch's would take the whole time limit."""
        report = ("--error-exitcode", str(_FOUND_SOMETHING), "--log-file", str(self.folder / f"{tool}.txt"))
        only = ("--kernel-regex", "kns=prcl") if self.cuda and _filters_kernels() else ()
        command = ("compute-sanitizer", "--tool", tool, *only, *report)
        return self.phase(
            tool, 60 if tool == "memcheck" else 50, f"{tool} finds nothing in the native kernels",
            (*command, *_bench("gpu-sanitize"), *_native()), tools=("compute-sanitizer",),
            # Without PyTorch's cache every tensor is a separate allocation, whose bounds are checked.
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip

    def ncu(self) -> Phase:
        kernels = ("--kernel-name", "regex:info_nce_kernel|rows_kernel", "--launch-count", "2")
        # The contrast launches both kernels.
        run = (*_bench("ops"), "contrast", "--device", "cuda", "--size", "voc", "--dtype", "bfloat16",
               "--candidates", "native", "--rounds", "1")  # fmt: skip
        # The clocks stay as they are: others may use the machine.
        out = ("--clock-control", "none", "--set", "full", "-o", str(self.folder / "kernels"))
        verifies = "stall reasons and L2 hits of the two largest kernels"
        return self.phase("ncu", 40, verifies, ("ncu", *out, *kernels, *run), tools=("ncu",))


def op_tests(root: Path = _ROOT) -> list[str]:
    """Test files whose tests run at every place, GPUs included."""
    files = sorted((root / "tests").rglob("test_*.py"))
    return [str(file.relative_to(root)) for file in files if 'everywhere("' in file.read_text()]


def _bench(name: str) -> tuple[str, ...]:
    return _PYTHON, "-m", "bench", name


def _native() -> tuple[str, ...]:
    return "--backend", "native"


def _cpu(arguments: Sequence[str]) -> tuple[str, ...]:
    return "--device", "cpu", *arguments


def _filters_kernels() -> bool:
    """Whether this compute-sanitizer can select kernels by name."""
    try:
        usage = subprocess.run(
            ["compute-sanitizer", "--help"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "--kernel-regex" in usage.stdout
