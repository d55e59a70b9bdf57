"""Devices: their choice, and the settings of PyTorch for them."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from prcl_fast.device import prepare_device

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16, 2**20)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
prepare_device(torch.device("cpu"), threads=1, tf32=False)
faults()
print(first, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_freed_memory_is_used_again_without_the_systems_help() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 20 * 1000  # of 4 kB each, or some of a huge page
    assert after < before / 100
