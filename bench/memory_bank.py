"""Virtual negatives against a memory bank [IJCV, table 7]: time and memory of the whole contrast with each.

python -m bench.memory_bank [--size small|voc|cityscapes] [--device auto|cpu|cuda] [--rounds 15] [--json FILE]

All candidates run in turns on the same batch, forward and backward; state is what each keeps between steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import machine
from bench.case import CONTRAST_SIZES, Options, Sizes
from bench.contrast import contrast_module
from bench.harness import milliseconds, percentile
from bench.inputs import Batch, batches
from bench.memory import Meter, tensor_bytes
from bench.run import write_result
from prcl_fast.cli.tables import print_table
from prcl_fast.device import choose_device
from prcl_fast.losses import ProbabilisticContrast

KIND = "prcl_fast-memory-bank"
# Name, and the arguments of ProbabilisticContrast.
CANDIDATES: dict[str, dict[str, int]] = {
    "neither": {"virtual_negatives": 0},
    "4 virtual negatives": {"virtual_negatives": 4},
    "bank of 1024, 4 drawn": {"virtual_negatives": 0, "memory_bank": 1024, "bank_negatives": 4},
    "bank of 1024, 64 drawn": {"virtual_negatives": 0, "memory_bank": 1024, "bank_negatives": 64},
    "bank of 8192, 64 drawn": {"virtual_negatives": 0, "memory_bank": 8192, "bank_negatives": 64},
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=("small", "voc", "cityscapes"), default="small")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device = choose_device(options.device).type
    result = measure(CONTRAST_SIZES[device][options.size], options.size, device, options.rounds)
    if options.json is not None:
        write_result(result, options.json)
    rows = [
        [name, f"{row['ms']:.2f}", f"{row['ms_20']:.2f} to {row['ms_80']:.2f}"]
        + ["" if row[key] is None else f"{row[key] / 1e6:.2f}" for key in ("state_bytes", "peak_bytes")]
        for name, row in result["rows"].items()
    ]
    columns = ["negatives beyond the batch", "median ms", "20 to 80 %", "state MB", "peak MB"]
    print_table(f"{result['machine']['device']}, {result['shape']}", columns, rows, right=(1, 2, 3, 4))


def measure(sizes: Sizes, size: str, device: str, rounds: int) -> dict[str, Any]:
    """Every candidate's medians over `rounds`, and the bytes that it keeps and that a call takes."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    (batch, *_) = batches(sizes, Options(size, device, dtype, "coherent"))
    mu, var = batch.mu.requires_grad_(), batch.var.requires_grad_()
    modules = {
        name: contrast_module(sizes, device, prototype="global", **arguments)
        for name, arguments in CANDIDATES.items()
    }
    times: dict[str, list[float]] = {name: [] for name in modules}
    peaks = {name: _peak(module, mu, var, batch, device) for name, module in modules.items()}
    for _ in range(rounds):
        for name, module in modules.items():
            times[name].append(milliseconds(lambda module=module: _call(module, mu, var, batch), device))
    return {
        "kind": KIND,
        "machine": machine.describe(device),
        "shape": str(sizes),
        "rounds": rounds,
        "rows": {
            name: {
                "ms": percentile(times[name], 50),
                "ms_20": percentile(times[name], 20),
                "ms_80": percentile(times[name], 80),
                "state_bytes": tensor_bytes(module.state_dict().values()),
                "peak_bytes": peaks[name],
            }
            for name, module in modules.items()
        },
    }


def _call(module: ProbabilisticContrast, mu: Tensor, var: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    loss = module(mu, var, batch.label, batch.valid, batch.confidence, batch.seed)
    return (loss, *torch.autograd.grad(loss, (mu, var)))


def _peak(module: ProbabilisticContrast, mu: Tensor, var: Tensor, batch: Batch, device: str) -> int | None:
    """Bytes beyond inputs and gradients, of a call after a first one."""
    _call(module, mu, var, batch)
    meter = Meter(device)
    meter.start()
    loss = module(mu, var, batch.label, batch.valid, batch.confidence, batch.seed)
    meter.after_forward(loss.nbytes)
    gradients = torch.autograd.grad(loss, (mu, var))
    meter.after_backward(tensor_bytes(gradients))
    return meter.peak


if __name__ == "__main__":
    main()
