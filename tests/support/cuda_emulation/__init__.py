"""The CUDA sources compiled for the CPU, so that their indices and sums are tested where there is no GPU.

The headers of this folder come first on the include path and stand in for the CUDA runtime and for those of
csrc/cuda that only a GPU can run (cuda/launch.h, ...). So g++ compiles csrc/cuda/*.cu into a library that has
the ops of `prcl_fast_native` under the name `prcl_fast_emulated`, on CPU tensors. It cannot show speed, the
rounding of approximate device functions, or races that change no value in the emulated order of threads.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from prcl_fast.ops import registry

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[2]
_OPS = torch.library.Library("prcl_fast_emulated", "DEF")
_NOT_EMULATED = ("device.cu",)  # asks the CUDA driver


@functools.cache
def load() -> str | None:
    """Builds the library if its sources changed, and loads it; returns None, or why this machine cannot.

    Raises:
        RuntimeError: a source does not compile; the message is the compiler's.
    """
    if sys.platform != "linux":
        return "the emulation of CUDA threads needs Linux"
    flags = _build_flags()
    compiler = shlex.split(flags.cxx)[0]
    if shutil.which(compiler) is None:
        return f"the C++ compiler {compiler} was not found"
    library = _library(flags, _cuda_sources())
    for schema in registry.schemas():
        _OPS.define(schema)
    torch.ops.load_library(library)
    return None


def _cuda_sources() -> list[Path]:
    return [path for path in sorted((_ROOT / "csrc/cuda").glob("*.cu")) if path.name not in _NOT_EMULATED]


def _library(flags: Any, cuda_sources: list[Path]) -> Path:
    """The library's file, named after all that it is made from; built where it does not exist.

    Another process that wants it waits meanwhile: pytest's workers all do at their start.
    """
    compiler = shlex.split(flags.cxx)
    # The later -O wins; kernels with every loop unrolled take long to optimise.
    compile_one = [
        *compiler,
        "-I",
        str(_HERE),
        *flags.compile,
        "-O1",
        "-Wno-unknown-pragmas",
        "-x",
        "c++",
        "-c",
    ]
    sources = [*cuda_sources, _HERE / "test_kernels.cu"]
    digest = hashlib.sha256(repr((compile_one, sources, torch.__version__)).encode())
    digest.update(_run([*compiler, "--version"]).encode())
    headers = [path for folder in (_ROOT / "csrc", _HERE) for path in sorted(folder.rglob("*.*h"))]
    for path in (*sources, *headers):
        digest.update(f"{path} {path.stat().st_size} ".encode() + path.read_bytes())
    library = _ROOT / "build" / "cuda_emulation" / f"{digest.hexdigest()[:16]}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with (
        (library.parent / "lock").open("w") as lock,
        tempfile.TemporaryDirectory(dir=library.parent) as folder,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.is_file():
            return library
        objects = [f"{folder}/{source.name}.o" for source in sources]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            commands = [
                [*compile_one, str(source), "-o", out] for source, out in zip(sources, objects, strict=True)
            ]
            list(pool.map(_run, commands))
        _run([*compiler, *objects, *flags.link, "-o", f"{folder}/library.so"])
        os.replace(f"{folder}/library.so", library)
    return library


def _build_flags() -> Any:
    """The compiler and flags of the real libraries, from setup.py."""
    spec = importlib.util.spec_from_file_location("prcl_fast_setup", _ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.build_flags()


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{result.stderr}")
    return result.stdout
