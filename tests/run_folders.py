"""Run folders without training: the checkpoint of freshly initialised networks, and made-up metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from prcl_fast.config import config_fingerprint, dump_config, parse_config
from prcl_fast.data.source import build_source
from prcl_fast.engine.checkpoint import save_checkpoint
from prcl_fast.methods import build_method


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
        "fingerprint": config_fingerprint(config),
        "classes": list(names),
        "palette": source.palette.tolist(),
        "iteration": 40,
        "method": method.state_dict(),
        "optimizer": {},
        "scaler": {},
        "progress": {},
    }
    save_checkpoint(folder / "best.pt", state)


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
            records.append(record | {"iou": {"disc": 50 * t, "square": None}})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
