"""Run folders without training: checkpoints, metrics, a full disk; and comparison of final states."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prcl_fast.config import dump_config, parse_config
from prcl_fast.data.sources import build_source
from prcl_fast.methods import build_method
from prcl_fast.runs.checkpoint import load_checkpoint, save_checkpoint


def write_run(folder: Path, tree: dict[str, Any], classes: tuple[str, ...] | None = None) -> None:
    """Writes folder/best.pt for the configuration `tree`; `classes` replaces those of its data."""
    config = parse_config(tree, "test")
    source = build_source(config.data)
    names = source.classes if classes is None else classes
    torch.manual_seed(0)
    method = build_method(config, len(names))
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "config": dump_config(config),
        "classes": list(names),
        "palette": np.resize(source.palette, (len(names), 3)).tolist(),
        "iteration": 40,
        "method": method.state_dict(),
        "optimizer": {},
        "scaler": {},
        "progress": {"seconds": 0.0, "best_miou": -1.0, "best_iteration": 0, "last": {}, "evaluated": 0},
    }
    save_checkpoint(folder / "best.pt", state)


def small_state(iteration: int, size: int = 8) -> dict[str, Any]:
    """The state of a checkpoint, with one tensor of `size` numbers for a method."""
    return {
        "config": {},
        "classes": ["a", "b"],
        "palette": [[0, 0, 0], [1, 1, 1]],
        "iteration": iteration,
        "method": {"weight": torch.full((size,), float(iteration))},
        "optimizer": {},
        "scaler": {},
        "progress": {"seconds": 0.0, "best_miou": -1.0, "best_iteration": 0, "last": {}, "evaluated": 0},
    }


def iterations(folder: Path) -> dict[str, int]:
    """The iterations of the checkpoint files in `folder`, all of them undamaged."""
    return {path.name: load_checkpoint(path)["iteration"] for path in folder.glob("*.pt")}


def silent(line: str) -> None:
    """A `say` that expects no line."""
    raise AssertionError(line)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Within the block no file grows over `size` bytes: the system refuses to write, as on a full disk."""
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))


def write_metrics(folder: Path, method: str, steps: int = 40) -> None:
    """Writes folder/metrics.jsonl with the keys that `method` logs."""
    records: list[dict[str, Any]] = []
    for iteration in range(2, steps + 1, 2):
        t = iteration / steps
        record: dict[str, Any] = {"kind": "train", "iteration": iteration, "loss": 2 - t, "lr": 0.01}
        record["loss_supervised"] = 1.5 - t
        if method != "supervised":
            record |= {"loss_unsupervised": 0.1 * t, "omega": t}
        if method == "prcl":
            record |= {"loss_contrast": 6.2 - 2 * t, "chance": 6.24, "anchors": [3, 0, 5]}
            record |= {"variance_mean": 0.5 - 0.2 * t, "variance_std": 0.05, "mu_mean": 0.0, "mu_std": 1 + t}
        records.append(record)
        if iteration % 10 == 0:
            student = 50 * t if method == "supervised" else 45 * t
            record = {"kind": "eval", "iteration": iteration, "miou": 50 * t, "miou_student": student}
            if method == "prcl":
                record |= {"variance_auroc": 0.5 + 0.2 * t, "variance_auroc_student": 0.5 + 0.1 * t}
                record |= {"confidence_auroc": 0.8, "variance_moved": 0.1 * t}
            records.append(record | {"iou": {"disc": 50 * t, "square": None}})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def final_state(output: Path) -> dict:
    state = load_checkpoint(output / "last.pt")
    return {key: state[key] for key in ("method", "optimizer", "iteration")}


def same_state(a: object, b: object) -> bool:
    """Bitwise equality of nested states."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same_state(x, y) for x, y in zip(a, b, strict=True))
    return a == b
