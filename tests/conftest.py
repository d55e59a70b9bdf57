"""Fixtures of all tests: a small PRCL run, two processes in one group.

The tests of ops and kernels need only PyTorch, NumPy and pytest. So nothing here imports another package
before a test uses it, and a test file that imports a missing package is skipped.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from support.processes import Pair, pair
from support.tiny import tiny_tree

if TYPE_CHECKING:
    from prcl_fast.config import Config

# Dependencies of the package that its ops do not need.
_NOT_FOR_OPS = ("pydantic", "typer", "rich", "yaml", "PIL", "matplotlib", "sklearn", "scipy", "tensorboard")

torch.set_num_threads(1)
os.environ.setdefault("COLUMNS", "200")  # so that tables are not cut where there is no terminal
if not torch.cuda.is_available():
    # Before any kernel is imported: without a GPU, Triton kernels are tested in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, pytest.CollectReport]:
    """Skips a test file that imports a package of `_NOT_FOR_OPS` that is not installed."""
    report: Any = yield
    error = None if report.call.excinfo is None else report.call.excinfo.value.__cause__
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in _NOT_FOR_OPS:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 1, f"Skipped: the package {error.name} is not installed")
    return report


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
