"""Missing packages: tests of the ops run without them, and benchmarks name the one they lack."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import pytest_make_collect_report
from support.paths import ROOT


def without(package: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m ARGUMENTS` with the package not importable."""
    (folder / f"{package}.py").write_text(f"raise ModuleNotFoundError('not here', name='{package}')\n")
    environment = os.environ | {"PYTHONPATH": str(folder), "PRCL_TEST_PLACE": "cpu-torch"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_tests_of_ops_run_and_those_of_configurations_say_why_they_do_not(tmp_path: Path) -> None:
    files = ("tests/ops/test_sample_anchors.py", "tests/config/test_config.py")
    result = without(
        "pydantic", tmp_path, "pytest", "-rs", "-p", "no:cacheprovider", "-k", "cpu-torch", *files
    )
    assert result.returncode == 0, result.stdout
    assert "tests/config/test_config.py:1: the package pydantic is not installed" in result.stdout
    assert " passed, 1 skipped" in result.stdout


@pytest.mark.parametrize(
    ("missing", "outcome"),
    [
        ("pydantic", "skipped"),
        ("yaml.nodes", "skipped"),
        ("prcl_fast.confg", "failed"),
        ("pydantics", "failed"),
    ],
)
def test_only_a_missing_package_skips_a_test_file(missing: str, outcome: str) -> None:
    error = pytest.Collector.CollectError("cannot be imported")
    error.__cause__ = ModuleNotFoundError("not here", name=missing)
    report: Any = SimpleNamespace(
        outcome="failed", call=SimpleNamespace(excinfo=SimpleNamespace(value=error))
    )
    collector: Any = SimpleNamespace(path=Path("test_some.py"))
    hook = pytest_make_collect_report(collector)
    next(hook)
    with pytest.raises(StopIteration):
        hook.send(report)
    assert report.outcome == outcome


@pytest.mark.parametrize(
    ("command", "package"),
    [("ops", "typer"), ("step", "pydantic"), ("same-losses", "pydantic")],
)
def test_a_benchmark_names_the_package_that_it_lacks_with_status_2(
    tmp_path: Path, command: str, package: str
) -> None:
    result = without(package, tmp_path, "bench", command, "--help")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"bench {command}: needs the package {package}, which is not installed\n"
