"""Peak rates of this machine in PyTorch: copies, gathers of rows, a matrix product."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from bench.ops.case import Ceilings
from bench.ops.harness import milliseconds

# (bytes of a copy, rows gathered, pools of the gather in bytes, n of an n x n x n product)
_AMOUNTS = {
    "cpu": (128 << 20, 1 << 16, (2 << 20, 16 << 20, 128 << 20), 1024),
    "cuda": (2 << 30, 1 << 22, (10 << 20, 100 << 20, 1 << 30), 8192),
}
# One feature of 256 dimensions: bfloat16 on a GPU, float32 on a CPU.
_ROW_BYTES = {"cpu": 1024, "cuda": 512}
_ROUNDS = 7


def measure(device: str) -> tuple[Ceilings, dict[str, Any]]:
    """The ceilings, and a report of all measured rates."""
    copy_bytes, rows, pools, n = _AMOUNTS[device]
    row_bytes = _ROW_BYTES[device]
    copy = _copy(copy_bytes, device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    gathers = {pool: _gather(pool, rows, row_bytes, dtype, device) for pool in pools}

    left, right = torch.rand(2, n, n, device=device).unbind()
    arithmetic = n**3 / _seconds(lambda: left @ right, device)  # PyTorch's default: no TF32
    # The fastest pool, which fits into a cache, as the pixels of a single class may.
    ceilings = Ceilings(copy, max(gathers.values()), arithmetic, row_bytes)
    report = {
        "copy_gb_s": copy / 1e9,
        "gather_row_bytes": row_bytes,
        "gather_gb_s": {f"{pool >> 20} MB pool": rate / 1e9 for pool, rate in gathers.items()},
        "multiply_adds_g_s": arithmetic / 1e9,
    }
    return ceilings, report


def _copy(size: int, device: str) -> float:
    """Bytes per second, read and written."""
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def _gather(pool: int, rows: int, row_bytes: int, dtype: torch.dtype, device: str) -> float:
    """Bytes per second by the better of two ways: rows written out (which counts too), or summed in bags."""
    table = torch.rand(pool // row_bytes, row_bytes // dtype.itemsize, device=device).to(dtype)
    index = torch.randint(len(table), (rows,), device=device)
    bags = index.view(-1, 64)
    written = torch.empty(rows, table.shape[1], dtype=dtype, device=device)
    select = _seconds(lambda: torch.index_select(table, 0, index, out=written), device)
    summed = _seconds(lambda: F.embedding_bag(bags, table, mode="sum"), device)
    return rows * row_bytes * max(2 / select, 1 / summed)


def _seconds(call: Callable[[], Any], device: str) -> float:
    call()
    return statistics.median(milliseconds(call, device) for _ in range(_ROUNDS)) / 1e3
