"""`prcl doctor`: the backends of each op, and reasons of unavailable ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from prcl_fast import __version__
from prcl_fast.cli.doctor import doctor
from prcl_fast.ops import native, registry
from support.paths import ROOT


def output(monkeypatch: pytest.MonkeyPatch, columns: int = 250) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    app = typer.Typer()
    app.command()(doctor)
    result = CliRunner().invoke(app)
    assert result.exit_code == 0, result.output
    return result.output


def test_versions_and_every_op_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    text = output(monkeypatch)
    assert __version__ in text
    assert torch.__version__ in text
    for name in registry.op_names():
        assert name in text


def test_the_automatic_choice_is_shown_for_each_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [line.split() for line in output(monkeypatch).splitlines() if "│ cpu " in line]
    assert [row[1] for row in rows] == list(registry.op_names())
    for row in rows:
        dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        assert row[5:12:2] == [registry.automatic(row[1], "cpu", dtype) for dtype in dtypes]


def test_the_reason_of_the_order_stands_beside_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    text = output(monkeypatch, columns=400)
    rows = [line for line in text.splitlines() if "│ cpu " in line]
    for name, row in zip(registry.op_names(), rows, strict=True):
        number = row.rstrip(" │").split()[-1]
        assert f"{number} native before torch, {registry.reason_of_order(name, 'cpu')}" in text.splitlines()


def test_every_op_has_a_reason_for_its_order_and_every_reason_an_op() -> None:
    assert set(registry.ORDER) == set(registry.REASONS) == {"cpu", "cuda"}
    for device, order in registry.ORDER.items():
        assert set(order) <= set(registry.BACKENDS)
        assert set(registry.REASONS[device]) <= set(registry.op_names())
        for name in registry.op_names():
            reason = registry.reason_of_order(name, device)
            assert reason.startswith(("measured: ", "estimated ", "by design: "))


def test_a_measured_order_names_a_stored_result() -> None:
    reasons = {reason for devices in registry.REASONS.values() for reason in devices.values()}
    files = {
        re.search(r"bench/results/[\w.]+", reason) for reason in reasons if reason.startswith("measured")
    }
    assert files
    assert all(found and (ROOT / found[0]).is_file() for found in files)


def test_a_missing_library_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    native.cpu_library_error.cache_clear()
    try:
        text = output(monkeypatch)
    finally:
        native.cpu_library_error.cache_clear()
    assert "_native.so was not built: install prcl_fast again without PRCL_NO_NATIVE" in text
    row = next(line for line in text.splitlines() if " mutual_likelihood_score " in line).split()
    assert row[5] == "torch"  # op, device, float32 between bars


def test_a_missing_compiler_does_not_stop_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert "not found in CUDA_HOME, on PATH or in /usr/local/cuda" in output(monkeypatch)
