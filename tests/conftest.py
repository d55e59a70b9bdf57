"""A run small enough for a test: generated images, the smallest network, a few steps.

The tests of ops and kernels need PyTorch, NumPy and pytest alone: nothing here imports another package before
a test asks for it, and a test file whose imports need one that is missing is skipped.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from processes import Pair, pair

if TYPE_CHECKING:
    from prcl_fast.config import Config

# What the package depends on and its ops do without.
_NOT_FOR_OPS = ("pydantic", "typer", "rich", "yaml", "PIL", "matplotlib", "sklearn", "scipy", "tensorboard")

torch.set_num_threads(1)
os.environ.setdefault("COLUMNS", "200")  # so that tables are not cut where there is no terminal
if not torch.cuda.is_available():
    # Before any kernel is imported: without a GPU, Triton kernels are tested in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, pytest.CollectReport]:
    """Skips a test file whose imports end at a package of `_NOT_FOR_OPS` that is not installed."""
    report: Any = yield
    error = None if report.call.excinfo is None else report.call.excinfo.value.__cause__
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in _NOT_FOR_OPS:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 1, f"Skipped: the package {error.name} is not installed")
    return report


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


@pytest.fixture
def tiny(tmp_path: Path) -> Config:
    """A six-step PRCL run into tmp_path/run."""
    from prcl_fast.config import parse_config

    return parse_config(tiny_tree(tmp_path / "run"), "tiny")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two processes in one group, for the tests of a module."""
    with pair(tmp_path_factory.mktemp("pair")) as processes:
        yield processes
