"""Every Triton kernel compiles for a GPU that need not be there, and keeps its values in registers.

The hot loops also keep to budgets of instructions, counted in the SASS: a slow tile shows without a GPU.
Triton decides when a kernel is decorated whether it is interpreted, so the kernels are compiled by this file,
run as a script in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Also run as a script, which has only this folder on its path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.gpu import sass

ARCHITECTURE = 90
# What each kernel is launched with for 21 classes and 256 dimensions. `types` has the pointers' element
# types, where "x" stands for the features', or for the means' beside "s" for the variances'; other arguments
# are 32-bit integers, multiples of 16 if in `aligned`, or float32 if in `floats`.
# `others` are compile-time constants of other launches.
KERNELS: dict[str, dict[str, Any]] = {
    "class_lists._count_kernel": {
        "types": {"label": "i64", "valid": "u8", "hard": "u8", "table": "i32"},
        "meta": {"BLOCK": 1024},
    },
    "class_lists._scatter_kernel": {
        "types": {
            "label": "u8",
            "valid": "u8",
            "hard": "u8",
            "begin": "i64",
            "valid_order": "i32",
            "valid_start": "i32",
            "hard_order": "i32",
            "hard_start": "i32",
        },
        "meta": {"BLOCK": 1024},
    },
    "mutual_likelihood_score._forward_kernel": {
        "types": dict.fromkeys(("mu_a", "var_a", "mu_b", "var_b", "out"), "x"),
        "dtypes": ("fp32", "fp64"),
        "meta": {"MEAN": False, "TILE": 64},
        "others": ({"MEAN": True},),
        "num_warps": 8,
    },
    "mutual_likelihood_score._backward_kernel": {
        "types": dict.fromkeys(("grad", "mu_x", "var_x", "mu_y", "var_y", "grad_mu", "grad_var"), "x"),
        "dtypes": ("fp32", "fp64"),
        "meta": {"MEAN": False, "ROWS": 16, "DIMS": 64},
        "others": ({"MEAN": True},),
    },
    "probabilistic_info_nce._weight_kernel": {
        "types": {
            "anchor_index": "i64",
            "positive_count": "i64",
            "class_factor": "fp32",
            "weights": "fp32",
        },
        "meta": {"HAS_FACTOR": True, "BLOCK": 128},
        "others": ({"HAS_FACTOR": False},),
    },
    "philox_normal._normal_kernel": {
        "types": {"seed": "i64", "out": "fp32"},
        "meta": {"PURPOSE": 3, "BLOCK": 256},
    },
    "probabilistic_info_nce._anchor_kernel": {
        "types": {
            "mu": "x",
            "var": "s",
            "anchor_index": "i64",
            "negative_index": "i64",
            "positive_mean": "fp32",
            "positive_variance": "fp32",
            "virtual_mu": "fp32",
            "virtual_var": "fp32",
            "virtual_known": "u8",
            "norms": "fp32",
            "weights": "fp32",
            "loss": "fp32",
            "grad_mu": "fp32",
            "grad_var": "fp32",
        },
        "floats": ("scale",),
        "meta": {
            "POINTS": True,
            "NORMALIZE": True,
            "HAS_NORMS": True,
            "NEEDS_GRAD": True,
            "ROWS": 4,
            "DIMS": 256,
        },
        "others": (
            {"POINTS": False},
            {"HAS_NORMS": False},
            {"HAS_NORMS": False, "NORMALIZE": False},
            {"NEEDS_GRAD": False},
            {"DIMS": 16},
            {"DIMS": 512},
        ),
        "aligned": ("dims",),
        "num_warps": 1,
        "maxnreg": 176,
    },
    "probabilistic_info_nce._scatter_kernel": {
        "types": {
            "grad_loss": "fp32",
            "grad_mu_rows": "fp32",
            "grad_var_rows": "fp32",
            "pixels": "i64",
            "order": "i64",
            "ends": "i64",
            "grad_mu": "x",
            "grad_var": "s",
        },
        "meta": {"DIMS": 256},
    },
    "prototype_statistics._sum_kernel": {
        "types": {
            "mu": "x",
            "var": "s",
            "order": "i32",
            "start": "i32",
            "sums": "fp32",
            "squares": "fp32",
        },
        "meta": {"NORMS": True, "PIXELS": 512, "ROWS": 16, "DIMS": 256, "CLASSES": 32},
        "aligned": ("dims",),
        "others": ({"NORMS": False}, {"ROWS": 128, "DIMS": 32}, {"CLASSES": 256}),
    },
    "prototype_statistics._merge_kernel": {
        "types": {
            "sums": "fp32",
            "start": "i32",
            "precision": "fp32",
            "weighted_mean": "fp32",
            "count": "i64",
        },
        "meta": {"PIXELS": 512, "ROWS": 32, "DIMS": 32, "CLASSES": 32},
        "aligned": ("dims",),
    },
    "pseudo_label._label_kernel": {
        "types": {"logits": "x", "label": "u8", "confidence": "fp32"},
        "floats": ("scale_y", "scale_x"),
        "meta": {"BLOCK": 512},
    },
    "sample_anchors._draw_kernel": {
        "types": {"seed": "i64", "order": "i32", "start": "i32", "out": "i64"},
        "meta": {"BLOCK": 256},
    },
    "sample_negatives._draw_kernel": {
        "types": {
            "seed": "i64",
            "probability": "fp64",
            "order": "i32",
            "start": "i32",
            "out": "i64",
        },
        "meta": {"CLASSES": 32, "BLOCK": 128},
        "others": ({"CLASSES": 1}, {"CLASSES": 256}),
    },
    "upsample_bilinear._upsample_kernel": {
        "types": {"x": "x", "out": "x"},
        "floats": ("scale_y", "scale_x"),
        "meta": {"ROWS": 8, "COLUMNS": 8, "CHANNELS": 128},
        "others": ({"COLUMNS": 64, "CHANNELS": 4},),
    },
    "upsample_bilinear._gather_kernel": {
        "types": {"grad": "x", "out": "x"},
        "floats": ("scale_y", "scale_x"),
        "meta": {"ROWS": 8, "COLUMNS": 8, "CHANNELS": 128},
        "others": ({"COLUMNS": 64, "CHANNELS": 4},),
    },
    "upsample_cross_entropy._loss_kernel": {
        "types": {
            "logits": "x",
            "target": "u8",
            "weight": "fp32",
            "losses": "fp32",
            "log_sums": "fp32",
        },
        "floats": ("scale_y", "scale_x"),
        "meta": {"NEEDS_GRAD": True, "BLOCK": 512},
        "others": ({"NEEDS_GRAD": False},),
    },
    "upsample_cross_entropy._axis_kernel": {
        "types": {"starts": "i32", "lows": "i32", "fractions": "fp32"},
        "floats": ("scale",),
        "meta": {"BLOCK": 64},
    },
    "upsample_cross_entropy._count_kernel": {
        "types": {"target": "u8", "counts": "i32"},
        "meta": {"BLOCK": 4096},
    },
    "upsample_cross_entropy._tile_kernel": {
        "types": {
            "logits": "x",
            "target": "u8",
            "weight": "fp32",
            "log_sums": "fp32",
            "scale": "fp32",
            "starts_y": "i32",
            "fractions_y": "fp32",
            "starts_x": "i32",
            "lows_x": "i32",
            "fractions_x": "fp32",
            "losses": "fp32",
            "grad": "fp32",
        },
        "meta": {
            "CLASSES": 21,
            "PADDED": 32,
            "ALL": True,
            "NEEDS_GRAD": True,
            "ROWS": 16,
            "COLUMNS": 16,
            "SPAN": 64,
        },
        "others": ({"NEEDS_GRAD": False}, {"ALL": False, "CLASSES": 16, "PADDED": 16}),
        "num_warps": 2,
    },
    "variance_head._moments_kernel": {
        "types": {"x": "x", "mean_out": "fp32", "squares_out": "fp32"},
        "meta": {"SPAN": 512, "ROWS": 32, "DIMS": 128},
        "others": ({"ROWS": 512, "DIMS": 1},),
    },
    "variance_head._forward_kernel": {
        "types": {"x": "x", "y": "fp32"} | dict.fromkeys(("mean", "var", "gamma", "beta"), "fp32"),
        "floats": ("eps",),
        "meta": {"ROWS": 32, "DIMS": 128},
        "others": ({"ROWS": 512, "DIMS": 1},),
    },
    "variance_head._sums_kernel": {
        "types": {"x": "x", "grad": "fp32", "sums": "fp32"}
        | dict.fromkeys(("mean", "var", "gamma", "beta"), "fp32"),
        "floats": ("eps",),
        "meta": {"SPAN": 512, "ROWS": 32, "DIMS": 128},
        "others": ({"ROWS": 512, "DIMS": 1},),
    },
    "variance_head._backward_kernel": {
        "types": {"x": "x", "grad_x": "x", "grad": "fp32"}
        | dict.fromkeys(("mean", "var", "gamma", "beta", "means"), "fp32"),
        "floats": ("eps",),
        "meta": {"HAS_MEANS": True, "ROWS": 32, "DIMS": 128},
        "others": ({"HAS_MEANS": False}, {"ROWS": 512, "DIMS": 1}),
    },
}
# What kernels call; compiled with them.
FUNCTIONS = {
    "class_lists._classes",
    "class_lists._place",
    "interpolation.bilinear",
    "interpolation.corners",
    "interpolation.first_output",
    "interpolation.taps",
    "launch.at_least",
    "launch.log2",
    "launch.reciprocal",
    "philox.bounded",
    "philox.philox_words",
    "probabilistic_info_nce._add",
    "probabilistic_info_nce._log1p",
    "probabilistic_info_nce._candidates",
    "probabilistic_info_nce._pairs",
    "prototype_statistics._programs",
    "upsample_cross_entropy._across",
    "upsample_cross_entropy._load",
    "upsample_cross_entropy._split",
    "upsample_bilinear._between",
    "variance_head._sigmoid",
}


@dataclass(frozen=True)
class Budget:
    """Warp-instructions that a kernel's hot loop may issue for one unit of its work, with each feature dtype.

    The loop is the first one `depth` loops down; it makes `units` in a trip, with `trips` of the loop inside.
    """

    unit: str
    depth: int
    trips: tuple[int, ...]
    units: float
    most: dict[str, int]


# For 21 classes, 256 dimensions and images four times the size of the features.
BUDGETS = {
    "probabilistic_info_nce._anchor_kernel": Budget(
        "candidate row", 0, (), 4, {"fp32": 150, "bf16": 168, "bf16/fp32": 158}
    ),
    "prototype_statistics._sum_kernel": Budget("row", 0, (), 16, {"fp32": 130, "bf16": 100, "bf16/fp32": 95}),
    # A trip is a class: 20 of them after the first.
    "pseudo_label._label_kernel": Budget("32 pixels", 0, (), 512 / 32 / 20, {"fp32": 740, "bf16": 890}),
    # A trip is 64 columns of the four output rows of a strip.
    "upsample_cross_entropy._tile_kernel": Budget("32 pixels", 1, (4,), 8, {"fp32": 535, "bf16": 545}),
}
ONES = "ones"  # all sizes are 1, which Triton makes compile-time constants


def cases() -> list[tuple[str, str, str]]:
    """(kernel, dtype of the features, which launch: "", ONES, or the constants in which it differs).

    "bf16/fp32" is the dtype of means and that of variances.
    """
    found = []
    for name, kernel in KERNELS.items():
        of_features = "x" in kernel["types"].values()
        dtypes = kernel.get("dtypes", ("fp32", "bf16", "fp16")) if of_features else ("fp32",)
        if "s" in kernel["types"].values():
            dtypes = (*dtypes, "bf16/fp32")
        found += [(name, dtype, "") for dtype in dtypes]
        found += [(name, "fp32", other) for other in (ONES, *map(written, kernel.get("others", ())))]
    return found


def written(constants: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in constants.items())


def issued(cubin: bytes, name: str, cuobjdump: str) -> float:
    """Warp-instructions that the kernel `name` issues for one unit of its work."""
    budget = BUDGETS[name]
    loop = sass.loops(sass.disassemble(cubin, name.partition(".")[2], cuobjdump))[0]
    for _ in range(budget.depth):
        loop = loop.inner[0]
    return loop.issued(*budget.trips) * KERNELS[name].get("num_warps", 4) / budget.units


def jitted() -> set[str]:
    """Everything in the package that Triton compiles, as module.name."""
    from triton.runtime.jit import KernelInterface

    from prcl_fast import kernels

    found = set()
    for info in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{info.name}")
        for name, value in vars(module).items():
            # An interpreted function has no module of its own: its Python function says where it is from.
            function = getattr(value, "fn", None)
            if isinstance(value, KernelInterface) and function.__module__ == module.__name__:
                found.add(f"{info.name}.{name}")
    return found


def compile_all() -> list[dict[str, Any]]:
    """Per case: the error, or the report of the assembler and the instructions of a unit of work.

    The last two are None where Triton brings no ptxas or there is no cuobjdump.
    """
    from triton import compile as triton_compile
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    ptxas = knobs.nvidia.ptxas.path if Path(knobs.nvidia.ptxas.path).is_file() else None
    cuobjdump = sass.disassembler()
    results = []
    for name, dtype, launch in cases():
        case, ones = KERNELS[name], launch == ONES
        of_means, _, of_variances = dtype.partition("/")
        module, _, attribute = name.partition(".")
        kernel = getattr(importlib.import_module(f"prcl_fast.kernels.{module}"), attribute)
        signature: dict[str, str] = {}
        constants = dict(case["meta"])
        constants |= next((other for other in case.get("others", ()) if written(other) == launch), {})
        for argument in kernel.arg_names:
            if argument in case["types"]:
                element = case["types"][argument]
                signature[argument] = "*" + {"x": of_means, "s": of_variances or of_means}.get(
                    element, element
                )
            elif argument in case["meta"]:
                signature[argument] = "constexpr"
            elif argument in case.get("floats", ()):
                signature[argument] = "fp32"
            else:
                signature[argument] = "constexpr" if ones else "i32"
                constants |= {argument: 1} if ones else {}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, (argument, kind) in enumerate(signature.items())
            if kind.startswith("*") or (argument in case.get("aligned", ()) and not ones)
        }
        result: dict[str, Any] = {
            "case": [name, dtype, launch],
            "error": None,
            "report": None,
            "issued": None,
        }
        try:
            compiled = triton_compile(
                ASTSource(kernel, signature, constants, aligned),
                target=GPUTarget("cuda", ARCHITECTURE, 32),
                options={"num_warps": case.get("num_warps", 4), "maxnreg": case.get("maxnreg")},
            )
            assert compiled.asm["cubin"]
            if ptxas and not launch:
                result["report"] = assemble(ptxas, compiled.asm["ptx"])
            if cuobjdump and not launch and dtype in (BUDGETS[name].most if name in BUDGETS else ()):
                result["issued"] = issued(compiled.asm["cubin"], name, cuobjdump)
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}"
        results.append(result)
    return results


def assemble(ptxas: str, ptx: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name=sm_{ARCHITECTURE}a", str(source), "-o", str(source) + ".cubin"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str, str], dict[str, Any]]:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return {tuple(result["case"]): result for result in json.loads(process.stdout)}


@pytest.mark.parametrize("case", cases(), ids=lambda case: "-".join(filter(None, case)))
def test_a_kernel_compiles(
    compiled: dict[tuple[str, str, str], dict[str, Any]], case: tuple[str, str, str]
) -> None:
    assert compiled[case]["error"] is None


@pytest.mark.parametrize(
    "case",
    [case for case in cases() if case[1] not in ("fp64", "fp16") and not case[2]],
    ids=lambda case: f"{case[0]}-{case[1]}",
)
def test_a_kernel_keeps_its_values_in_registers(
    compiled: dict[tuple[str, str, str], dict[str, Any]], case: tuple[str, str, str]
) -> None:
    report = compiled[case]["report"]
    if report is None:
        pytest.skip("Triton brings no ptxas, which knows of spills")
    # Two numbers for the kernel, and two for each function that it calls, such as the double cosine's.
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    assert len(spills) >= 2, report
    assert set(spills) == {"0"}, report


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name, budget in BUDGETS.items() for dtype in budget.most]
)
def test_a_hot_loop_keeps_to_its_budget_of_instructions(
    compiled: dict[tuple[str, str, str], dict[str, Any]], name: str, dtype: str
) -> None:
    count = compiled[name, dtype, ""]["issued"]
    if count is None:
        pytest.skip("there is no cuobjdump, neither with Triton nor on PATH")
    assert count <= BUDGETS[name].most[dtype]


def test_every_kernel_of_the_package_is_compiled_here() -> None:
    pytest.importorskip("triton")
    assert jitted() == set(KERNELS) | FUNCTIONS


def show(results: list[dict[str, Any]]) -> None:
    """A line per hot loop and dtype: warp-instructions of a unit of its work, and its budget."""
    for result in results:
        name, dtype, _ = result["case"]
        if result["issued"] is not None:
            budget = BUDGETS[name]
            print(f"{name:42} {dtype:10} {result['issued']:7.1f} of {budget.most[dtype]} a {budget.unit}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--instructions"]:
        show(compile_all())
    else:
        json.dump(compile_all(), sys.stdout)
