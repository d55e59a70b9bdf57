"""Virtual negatives against a memory bank [IJCV, table 7]: memory and time of the whole contrast.

python -m bench memory-bank [--size small|voc|cityscapes] [--device auto|cpu|cuda]
    [--rounds 15] [--json FILE]

All candidates run in turns on the same batch, forward and backward. "Memory" is what a candidate keeps
between steps, "peak" what a call allocates beyond that. Banks are full. They have the sizes of the table,
30000 and 65536 representations of each class (2.63 GiB at --size voc), and 1024 and 8192 at --size small.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import machine
from bench.arguments import parser
from bench.ops.case import CONTRAST_SIZES, Options, Sizes
from bench.ops.contrast import contrast_module
from bench.ops.harness import milliseconds, percentile
from bench.ops.inputs import Batch, batches
from bench.ops.memory import Meter, tensor_bytes
from bench.ops.run import write_result
from prcl_fast.console import print_table
from prcl_fast.device import choose_device
from prcl_fast.losses import FeatureBank, ProbabilisticContrast

KIND = "prcl_fast-memory-bank"
# Representations kept of each class.
SMALL_BANKS, BANKS = (1024, 8192), (30000, 65536)
DRAWN = (4, 64)  # of each class, from a bank


def main(arguments: Sequence[str]) -> None:
    """`python -m bench memory-bank`."""
    command = parser("memory-bank", __doc__)
    command.add_argument("--size", choices=("small", "voc", "cityscapes"), default="small")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda")
    command.add_argument("--rounds", type=int, default=15, help="timed calls of each candidate")
    command.add_argument("--json", type=Path, metavar="FILE", help="file for the result")
    options = command.parse_args(arguments)
    device = choose_device(options.device).type
    result = measure(CONTRAST_SIZES[device][options.size], options.size, device, options.rounds)
    if options.json is not None:
        write_result(result, options.json)
    rows = [
        [
            name,
            f"{row['state_bytes'] / 1e6:.2f}",
            f"{row['ms']:.2f}",
            f"{row['ms_20']:.2f} to {row['ms_80']:.2f}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.2f}",
        ]
        for name, row in result["rows"].items()
    ]
    columns = ["negatives beyond the batch", "memory MB", "median ms", "20 to 80 %", "peak MB"]
    print_table(f"{result['machine']['device']}, {result['shape']}", columns, rows, right=(1, 2, 3, 4))


def candidates(size: str) -> dict[str, dict[str, int]]:
    """By name, the arguments of ProbabilisticContrast."""
    found = {"neither": {"virtual_negatives": 0}, "4 virtual negatives": {"virtual_negatives": 4}}
    for places in SMALL_BANKS if size == "small" else BANKS:
        for drawn in DRAWN:
            found[f"bank of {places}, {drawn} drawn"] = {
                "virtual_negatives": 0,
                "memory_bank": places,
                "bank_negatives": drawn,
            }
    return found


def measure(sizes: Sizes, size: str, device: str, rounds: int) -> dict[str, Any]:
    """The median time of every candidate over `rounds`, the bytes of its state and the peak of a call."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    (batch, *_) = batches(sizes, Options(size, device, dtype, "coherent"))
    mu, var = batch.mu.requires_grad_(), batch.var.requires_grad_()
    modules = {
        name: contrast_module(sizes, device, prototype="global", **arguments)
        for name, arguments in candidates(size).items()
    }
    for module in modules.values():
        if module.bank is not None:
            _fill(module.bank)
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


def _fill(bank: FeatureBank) -> None:
    """Fills every place with numbers that are valid means and variances."""
    bank.features.uniform_(0.05, 0.95)
    bank.count.fill_(bank.size)


def _call(module: ProbabilisticContrast, mu: Tensor, var: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    loss = module(mu, var, batch.label, batch.valid, batch.confidence, batch.seed)
    return (loss, *torch.autograd.grad(loss, (mu, var)))


def _peak(module: ProbabilisticContrast, mu: Tensor, var: Tensor, batch: Batch, device: str) -> int | None:
    """Peak bytes of a second call, beyond inputs and gradients."""
    _call(module, mu, var, batch)
    meter = Meter(device)
    meter.start()
    loss = module(mu, var, batch.label, batch.valid, batch.confidence, batch.seed)
    meter.after_forward(loss.nbytes)
    gradients = torch.autograd.grad(loss, (mu, var))
    meter.after_backward(tensor_bytes(gradients))
    return meter.peak
