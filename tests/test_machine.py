"""The description of the machine and its memory."""

from __future__ import annotations

import errno
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import machine
from prcl_fast import __version__, console
from prcl_fast.machine import description, memory
from prcl_fast.machine.memory import out_of_memory

CPU = torch.device("cpu")


def test_results_carry_versions_machine_and_commit() -> None:
    found = description.provenance()
    assert set(found) == {"versions", "machine", "commit"}
    assert set(found["versions"]) == {"prcl_fast", "torch", "cuda", "python"}
    assert set(found["machine"]) == {"cpu", "cores", "gpus"}
    assert found["versions"]["prcl_fast"] == __version__


def test_results_of_benchmarks_carry_device_driver_threads_and_command() -> None:
    assert set(machine.describe("cpu")) == {
        *("device", "device_type", "driver", "cpu", "cores", "threads", "python", "torch", "triton"),
        *("prcl_fast", "commit", "date", "command"),
    }


def test_a_missing_program_or_package_is_no_error() -> None:
    assert description.command_output("no-such-program") == ""
    assert description.package_version("no-such-package") is None
    assert description.package_version("pytest") == pytest.__version__


def test_the_driver_is_the_first_line_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert description.driver_version() == "unknown"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf '570.1\\n570.1\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert description.driver_version() == "570.1"


def test_a_container_limits_the_available_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 90 kB\nMemAvailable: 50 kB\n")
    monkeypatch.setattr(memory, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CONTAINER", tmp_path)
    assert memory.available_memory() == 50 << 10
    (tmp_path / "memory.max").write_text("20000\n")
    (tmp_path / "memory.current").write_text("15000\n")
    assert description.free_memory(CPU) == 5000
    assert machine.fits(3500, "cpu")
    assert not machine.fits(3501, "cpu")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory() == 50 << 10
    (tmp_path / "meminfo").unlink()
    assert memory.available_memory() is None
    assert machine.fits(1 << 60, "cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep one peak for the whole process")
def test_the_peak_follows_what_is_resident() -> None:
    if not memory.reset_resident_peak():
        pytest.skip("this kernel cannot reset the peak")
    before = memory.resident_bytes()
    assert before is not None
    size = 64 << 20
    with mmap.mmap(-1, size) as block:  # fresh pages, which no allocator holds in reserve
        for offset in range(0, size, mmap.PAGESIZE):
            block[offset] = 1
        assert memory.resident_bytes() - before > 60 << 20
    assert memory.resident_peak() - before > 60 << 20
    assert memory.reset_resident_peak()
    assert memory.resident_peak() - before < 30 << 20


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you "
                "tried to allocate 4398046511104 bytes. Error code 12 (Cannot allocate memory)"
            ),
            "out of memory: 4096.0 GiB asked for at once; lower train.batch_labeled",
        ),
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total of 9 GiB"
            ),
            "out of memory on the GPU: 20.50 GiB asked for at once; lower train.batch_labeled",
        ),
        (
            MemoryError("Unable to allocate 3.64 TiB for an array with shape (1000000, 500000)"),
            "out of memory: 3.64 TiB asked for at once; lower",
        ),
        (MemoryError(), "out of memory; lower"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory; lower"),
    ],
)
def test_a_failed_allocation_is_one_line(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    assert console.run(fail, "prcl") == 1
    said = capsys.readouterr().err
    assert said.startswith(f"prcl: {line}")
    assert said.count("\n") == 1
    assert "prcl plan" in said


def test_real_failed_allocations_are_recognised() -> None:
    for allocate in (lambda: torch.empty(2**50), lambda: np.empty(2**55, np.uint8), lambda: bytearray(2**55)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert out_of_memory(caught.value) is not None


def test_other_errors_are_no_failed_allocation() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        console.run(lambda: torch.zeros(3).view(2, 2) and None, "prcl")
    for error in (RuntimeError("memory format"), OSError(errno.ENOSPC, "No space left"), ValueError("x")):
        assert out_of_memory(error) is None
