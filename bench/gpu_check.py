"""Everything there is to check on a machine with a GPU, in one folder and under ten minutes.

python -m bench.gpu_check --out DIR [--set ops|step] [--minutes 9.5] [--only tests --only voc_bfloat16]

Needs the sources and a Python with PyTorch, and no network. `_native_cuda.so` is taken where it is already
there, else built for this GPU; PRCL_NO_NATIVE=1 checks Triton and PyTorch alone. A step that fails or takes
too long does not stop the others. DIR holds a log of each step, junit XML, the benchmarks' results and
figures, and summary.md. Exit status 0: all passed, 1: something did not, 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.run import KIND, Row, label, read_result
from prcl_fast.data.atomic import write_text

_ROOT = Path(__file__).resolve().parent.parent
_PYTHON = sys.executable
_PACKAGE_AND_EAGER = "eager,native,native-shared16,triton,triton-shared16"
_DRAWING_SECONDS = 30  # kept for the last step
_FOUND_SOMETHING = 9  # exit status asked of compute-sanitizer


@dataclass(frozen=True)
class Step:
    """One command; `skipped` is why it is not run."""

    name: str
    command: Sequence[str]
    seconds: int
    skipped: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """How a step ended."""

    name: str
    status: str  # passed, failed, skipped
    seconds: float
    detail: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, help="folder of the results; by default bench/results/local/DATE-GPU"
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="time for all steps together")
    parser.add_argument("--set", choices=_SETS, default="ops", help="the ops, or the whole training step")
    parser.add_argument("--only", action="append", metavar="STEP", help="may be repeated")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu-check: PyTorch sees no CUDA device: nothing was checked", file=sys.stderr)
        return 2
    out = (options.out or _default_folder()).resolve()
    steps = _SETS[options.set](out)
    wanted = options.only or [step.name for step in steps]
    unknown = [name for name in wanted if name not in [step.name for step in steps]]
    if unknown:
        names = ", ".join(step.name for step in steps)
        print(f"gpu-check: --only: {unknown[0]!r} is not one of {names}", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    results = []
    for step in steps:
        if step.name in wanted:
            results.append(run_step(step, out, end - time.monotonic() - _DRAWING_SECONDS))
            print(f"{step.name}: {results[-1].status} {results[-1].detail}".rstrip(), flush=True)
            write_summary(out, results)
    if files := _result_files(out):
        results.append(run_step(_drawing(files, out), out, _DRAWING_SECONDS))
    write_summary(out, results)
    print(out / "summary.md")
    return 1 if any(result.status == "failed" for result in results) else 0


def run_step(step: Step, out: Path, seconds_left: float) -> Result:
    """Runs a step into out/<name>.log, and ends it with all its children when its time is over."""
    if step.skipped is not None:
        return Result(step.name, "skipped", 0.0, step.skipped)
    limit = min(step.seconds, seconds_left)
    if limit <= 0:
        return Result(step.name, "failed", 0.0, "no time was left")
    started = time.monotonic()
    (out / f"{step.name}.json").unlink(missing_ok=True)  # a former check's result
    with (out / f"{step.name}.log").open("w") as log:
        process = subprocess.Popen(
            step.command,
            cwd=_ROOT,
            env=os.environ | step.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return Result(step.name, "failed", limit, f"stopped after {limit:.0f} s")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = time.monotonic() - started
    if code:
        return Result(step.name, "failed", seconds, f"exit status {code}: {step.name}.log")
    return Result(step.name, "passed", seconds)


def write_summary(out: Path, results: Sequence[Result]) -> None:
    """summary.md: the machine, how each step ended, and the fastest candidate of each op."""
    failed = [result.name for result in results if result.status == "failed"]
    lines = [f"# GPU check: {'failed: ' + ', '.join(failed) if failed else 'passed'}", ""]
    environment = out / "environment.json"
    if environment.is_file():
        facts = json.loads(environment.read_text())
        lines += [f"- {name}: {facts[name]}" for name in ("device", "driver", "torch", "triton", "commit")]
        lines += [f"- {what}" for what in facts["not available"]]
    lines += ["", "| step | | seconds | |", "|---|---|---|---|"]
    lines += [f"| {x.name} | {x.status} | {x.seconds:.0f} | {x.detail} |" for x in results]
    for path in _result_files(out):
        lines += _fastest(path)
    write_text(out / "summary.md", "\n".join(lines) + "\n")


def _common(out: Path) -> list[Step]:
    return [
        _build(),
        Step("environment", (_PYTHON, "-m", "bench.machine", str(out / "environment.json")), 60),
    ]


def _pytest(out: Path, *what: str) -> Step:
    report = f"--junitxml={out / 'junit.xml'}"
    return Step("tests", (_PYTHON, "-m", "pytest", "-m", "gpu", report, "-p", "no:cacheprovider", *what), 200)


def _step_set(out: Path) -> list[Step]:
    def bench(size: str, seconds: int) -> Step:
        name = f"step_{size}"
        command = (_PYTHON, "-m", "bench.step", "--size", size, "--json", str(out / f"{name}.json"))
        return Step(name, command, seconds)

    losses = (_PYTHON, "-m", "bench.same_losses", "--json", str(out / "same_losses.json"))
    return [
        *_common(out),
        _pytest(out, "tests/test_step.py", "tests/test_prefetch.py"),
        bench("voc", 240),
        Step("same_losses", losses, 150),
        bench("cityscapes", 240),
    ]


def _op_set(out: Path) -> list[Step]:
    """The most telling first: the last ones lose where time runs out."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    no_sanitizer = None if Path(sanitizer).is_file() else "compute-sanitizer is not installed"

    def checked(tool: str) -> Step:
        report = ("--error-exitcode", str(_FOUND_SOMETHING), "--log-file", str(out / f"{tool}.txt"))
        backends = ("--backend", "native", "--backend", "triton")
        command = (sanitizer, "--tool", tool, *report, _PYTHON, "-m", "bench.sanitize", *backends)
        # Without PyTorch's cache every tensor is an allocation of its own, whose bounds are watched.
        return Step(tool, command, 100, no_sanitizer, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})

    def bench(name: str, size: str, dtype: str, *extra: str, seconds: int = 120) -> Step:
        options = ("--device", "cuda", "--size", size, "--dtype", dtype, "--json", str(out / f"{name}.json"))
        return Step(name, (_PYTHON, "-m", "bench", *options, *extra), seconds)

    ours = ("--candidates", _PACKAGE_AND_EAGER)
    uniform = (
        "--labels",
        "uniform",
        "prototype_statistics",
        "sample_anchors",
        "sample_negatives",
        "contrast",
    )
    return [
        *_common(out),
        Step("sync", (_PYTHON, "-m", "bench.sanitize", "--sync-error"), 90),
        _pytest(out),
        bench("voc_bfloat16", "voc", "bfloat16", *ours),
        bench("voc_float32", "voc", "float32", *ours),
        bench("cityscapes_bfloat16", "cityscapes", "bfloat16", *ours),
        bench("cityscapes_float32", "cityscapes", "float32", *ours),
        checked("memcheck"),
        checked("racecheck"),
        bench("voc_bfloat16_uniform", "voc", "bfloat16", *ours, *uniform),
        bench("voc_bfloat16_baselines", "voc", "bfloat16", "--rounds", "5", seconds=300),
    ]


_SETS = {"ops": _op_set, "step": _step_set}


def _build() -> Step:
    """The native library, unless there is one, or nothing to build it with."""
    skipped = None
    if os.environ.get("PRCL_NO_NATIVE", "0") not in ("", "0"):
        skipped = "PRCL_NO_NATIVE is set"
    elif (_ROOT / "prcl_fast" / "_native_cuda.so").is_file():
        skipped = "prcl_fast/_native_cuda.so is there and was taken as it is"
    command = (_PYTHON, "-W", "ignore", "setup.py", "-q", "build_ext", "--inplace")
    capability = "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else ""
    # For this GPU alone: a third of the time. Where nvcc is missing the step says so and fails.
    environment = {"TORCH_CUDA_ARCH_LIST": capability, "FORCE_CUDA": "1"}
    return Step("build", command, 300, skipped, environment)


def _drawing(files: Sequence[Path], out: Path) -> Step:
    command = (_PYTHON, "-m", "bench", "--plot", *map(str, files), "--out", str(out))
    return Step("figures", command, _DRAWING_SECONDS)


def _result_files(out: Path) -> list[Path]:
    """Those of the ops."""
    return sorted(path for path in out.glob("*.json") if json.loads(path.read_text()).get("kind") == KIND)


def _fastest(path: Path) -> list[str]:
    """A table of one result: where time was measured forward and backward, that of both."""
    lines = [
        "",
        f"{path.name}:",
        "",
        "| op | fastest | ms | floor / time | eager / fastest |",
        "|---|---|---|---|---|",
    ]
    groups: dict[str, dict[str, Row]] = {}
    for row in read_result(path)["rows"]:
        if row["ms"] is not None and row["direction"] != "backward":
            # Forward comes first; a row of both directions takes its place.
            groups.setdefault(label(row), {})[row["candidate"]] = row
    for name, rows in groups.items():
        best = min(rows.values(), key=lambda row: row["ms"])
        eager = f"{rows['eager']['ms'] / best['ms']:.1f}" if "eager" in rows else ""
        share = f"{100 * best['floor_share']:.0f} %"
        lines.append(f"| {name} | {best['candidate']} | {best['ms']:.3f} | {share} | {eager} |")
    return lines


def _default_folder() -> Path:
    device = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name()).strip("-")
    return _ROOT / "bench" / "results" / "local" / f"{time.strftime('%Y-%m-%d')}-{device}"


if __name__ == "__main__":
    sys.exit(main())
