"""The compiler's report on every CUDA kernel: registers within its budget, nothing spilled to memory.

A multiprocessor has 65536 registers, so that a budget is also a number of threads at work: 128 registers are
512 threads, 168 are 384. A kernel that outgrows its budget is slower in a way that no test of its results can
see. The budgets are for sm_90; the report is the one that building the library leaves, no GPU is needed.
"""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
from dataclasses import dataclass

import pytest

from support.paths import ROOT

ARCHITECTURE = "sm_90"
MAX_STATIC_SHARED = 48 * 1024

# Kernel, without namespaces, to the most registers that it may use on sm_90.
BUDGETS = {
    # class_lists.cu
    "count_kernel<*>": 40,
    "place_kernel<*>": 48,
    # device.cu
    "probe_kernel": 16,
    # mutual_likelihood_score.cu
    "forward_kernel<float>": 128,
    "forward_kernel<double>": 128,
    "backward_kernel<float>": 128,
    "backward_kernel<double>": 200,
    # probabilistic_info_nce.cu: up to 256, 512 and 1024 dimensions; two blocks of 8 anchors for the first
    "info_nce_kernel<*, 8, *>": 128,
    "info_nce_kernel<*, 16, *>": 255,
    "info_nce_kernel<*, 32, *>": 255,
    "class_weight_kernel": 32,
    "inverse_norm_kernel<*>": 32,
    "scatter_kernel<*>": 40,
    "sum_kernel<*>": 32,
    # philox_normal.cu
    "normal_kernel": 40,
    # prototype_statistics.cu
    "rows_kernel<*>": 128,
    "planes_kernel<*>": 128,
    "norms_kernel": 32,
    "merge_kernel": 32,
    # pseudo_label.cu
    "pseudo_label_kernel<*>": 128,
    # sample_anchors.cu, sample_negatives.cu
    "draw_anchors_kernel": 32,
    "draw_negatives_kernel": 32,
    # upsample_bilinear.cu: three blocks of 256 threads for the gradients
    "upsample_kernel<*>": 64,
    "gather_kernel<*>": 80,
    # upsample_cross_entropy.cu: two blocks of 192 threads for the gradients
    "count_kernel": 32,
    "gradient_kernel<*>": 168,
    "statistics_kernel<*>": 128,
    # variance_head.cu: four, three and two blocks of 256 threads
    "moments_kernel<*>": 64,
    "forward_kernel<*, *, *>": 80,
    "backward_sums_kernel<*>": 128,
    "backward_kernel<*, *, *>": 128,
    "merge_moments_kernel<*>": 64,
    "merge_sums_kernel": 64,
}
# Bytes of stack that are no spill: the double cosine has a table for angles that never come.
STACKS = {"normal_kernel": 40}


@dataclass(frozen=True)
class Kernel:
    """One line of the compiler's report."""

    name: str
    registers: int
    spilled_bytes: int
    stack_bytes: int
    shared_bytes: int


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    """All kernels of csrc/cuda, from the reports that the build of the library left."""
    reports = sorted((ROOT / "build" / "native").glob("*.ptxas"))
    if not reports:
        pytest.skip("the CUDA library was not built here")
    if shutil.which("c++filt") is None:
        pytest.skip("c++filt, which reads the kernels' names, is not on PATH")
    sources = {f"csrc_cuda_{path.name}.o.ptxas" for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    found = parsed("".join(path.read_text() for path in reports if path.name in sources))
    if not found:
        pytest.skip(f"the CUDA library was not built for {ARCHITECTURE}")
    return found


def parsed(report: str) -> list[Kernel]:
    """The kernels of a report of `ptxas -v`."""
    names = subprocess.run(["c++filt"], input=report, capture_output=True, text=True, check=True).stdout
    pattern = (
        rf"Compiling entry function '(?P<name>.*)' for '{ARCHITECTURE}'\n"
        r".*Function properties for .*\n"
        r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes .*\n"
        r".*Used (?P<registers>\d+) registers(?P<rest>.*)\n"
    )
    found = []
    for match in re.finditer(pattern, names):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found.append(
            Kernel(
                short_name(match["name"]),
                int(match["registers"]),
                int(match["stores"]) + int(match["loads"]),
                int(match["stack"]),
                int(shared[1]) if shared else 0,
            )
        )
    return found


def short_name(demangled: str) -> str:
    """`void a::b::kernel<c::T, 8>(int)` -> `kernel<T, 8>`."""
    name = demangled.removeprefix("void ").replace("(anonymous namespace)::", "")
    name = re.sub(r"\((?:[^()]|\([^()]*\))*\)$", "", name)
    return re.sub(r"\w+::", "", name)


def budget(kernel: Kernel) -> int | None:
    fitting = [most for pattern, most in BUDGETS.items() if fnmatch.fnmatchcase(kernel.name, pattern)]
    return fitting[0] if fitting else None


def test_every_kernel_has_a_budget_and_every_budget_a_kernel(kernels: list[Kernel]) -> None:
    assert [kernel.name for kernel in kernels if budget(kernel) is None] == []
    names = [kernel.name for kernel in kernels]
    assert [pattern for pattern in BUDGETS if not fnmatch.filter(names, pattern)] == []


def test_registers_stay_within_the_budgets(kernels: list[Kernel]) -> None:
    assert [kernel for kernel in kernels if kernel.registers > (budget(kernel) or 0)] == []


def test_no_kernel_spills_registers_or_uses_a_stack(kernels: list[Kernel]) -> None:
    assert [kernel for kernel in kernels if kernel.spilled_bytes] == []
    assert [kernel for kernel in kernels if kernel.stack_bytes > STACKS.get(kernel.name, 0)] == []


def test_static_shared_memory_fits_every_device(kernels: list[Kernel]) -> None:
    assert [kernel for kernel in kernels if kernel.shared_bytes > MAX_STATIC_SHARED] == []


def test_a_report_with_a_spill_is_read_as_one() -> None:
    if shutil.which("c++filt") is None:
        pytest.skip("c++filt, which reads the kernels' names, is not on PATH")
    report = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN1a6kernelIfLi8EEEvPKf' for 'sm_90'
ptxas info    : Function properties for _ZN1a6kernelIfLi8EEEvPKf
    40 bytes stack frame, 44 bytes spill stores, 104 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 40 bytes cumulative stack size, 512 bytes smem
"""
    assert parsed(report) == [Kernel("kernel<float, 8>", 128, 148, 40, 512)]
