"""The configuration of a run small enough for a test: generated images, the smallest network, six steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def tiny_tree(output: Path, **method: Any) -> dict[str, Any]:
    """The configuration of the small run as a plain tree."""
    return {
        "output": str(output),
        "data": {
            "kind": "synthetic",
            "synthetic": {"size": [64, 64], "labeled": 4, "unlabeled": 6, "val": 3},
            "crop": [64, 64],
            "workers": 0,
        },
        "model": {"backbone": "resnet18", "width": 16, "dim": 8},
        "method": {"name": "prcl", "anchors": 16, "negatives": 16, "delta_w": 0.0, "delta_s": 1.0} | method
        if method.get("name", "prcl") == "prcl"
        else method,
        "train": {
            "iterations": 6,
            "batch_labeled": 2,
            "batch_unlabeled": 2,
            "threads": 1,
            "log_every": 2,
            "eval_every": 3,
            "save_every": 2,
        },
    }


def shared_tree(output: Path, **train: Any) -> dict[str, Any]:
    """The small run's configuration with batches that two processes can share."""
    tree = tiny_tree(output)
    tree["train"] |= {"batch_labeled": 4, "batch_unlabeled": 4} | train
    return tree
