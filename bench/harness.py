"""Times candidates against each other and writes one JSON row for each.

Candidates take turns within each round, so that a slow moment of the machine hits all of them alike. A row
holds the median and the 20th and 80th percentile in milliseconds, and what the number depends on: device,
driver, PyTorch, commit. On CUDA each call is timed by events with the L2 cache flushed before it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "local"
_L2_BYTES = 256 << 20  # more than any GPU's L2


def arguments(description: str) -> argparse.Namespace:
    """The options of every benchmark: --device, --rounds, --output."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser.parse_args()


def compare(
    candidates: dict[str, Callable[[], Any]], *, device: str, rounds: int, **labels: Any
) -> list[dict[str, Any]]:
    """Runs the candidates in turns, `rounds` times each after one warm-up; returns a row for each.

    `labels` (op, shape, direction ...) go into every row.
    """
    for candidate in candidates.values():
        candidate()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            times[name].append(_cuda_ms(candidate) if device == "cuda" else _cpu_ms(candidate))
    return [
        labels
        | {"candidate": name, "ms": _percentile(values, 50)}
        | {"ms_20": _percentile(values, 20), "ms_80": _percentile(values, 80), "rounds": rounds}
        for name, values in times.items()
    ]


def write(name: str, rows: Sequence[dict[str, Any]], device: str, folder: Path) -> None:
    """Prints the rows and writes them, with the machine's description, to folder/<name>.json."""
    machine = _machine(device)
    for row in rows:
        label = " ".join(f"{key}={row[key]}" for key in row if not key.startswith(("ms", "rounds")))
        print(f"{label}: {row['ms']:.3f} ms ({row['ms_20']:.3f} to {row['ms_80']:.3f})")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    temporary = file.with_suffix(".tmp")
    temporary.write_text("\n".join(json.dumps(machine | row) for row in rows) + "\n")
    os.replace(temporary, file)


def _cpu_ms(candidate: Callable[[], Any]) -> float:
    start = time.perf_counter()
    candidate()
    return (time.perf_counter() - start) * 1e3


def _cuda_ms(candidate: Callable[[], Any]) -> float:
    torch.empty(_L2_BYTES, dtype=torch.uint8, device="cuda").zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    candidate()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _percentile(values: Sequence[float], percent: int) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(percent / 100).item()


def _machine(device: str) -> dict[str, Any]:
    commit = _output("git", "describe", "--always", "--dirty", "--exclude=*")
    if device == "cuda":
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        hardware = {"device": torch.cuda.get_device_name(), "driver": driver}
    else:
        hardware = {"device": _cpu_name(), "threads": torch.get_num_threads()}
    return hardware | {"torch": torch.__version__, "commit": commit}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
