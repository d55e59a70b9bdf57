"""`prcl doctor` names what runs where, and why something does not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from prcl_fast import __version__
from prcl_fast.cli.doctor import doctor
from prcl_fast.ops import _backend, _native
from prcl_fast.ops._preference import _PREFERENCE, preference
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
    for name in _backend.op_names():
        assert name in text


def test_the_automatic_choice_is_shown_for_each_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [line.split() for line in output(monkeypatch).splitlines() if "│ cpu " in line]
    assert [row[1] for row in rows] == list(_backend.op_names())
    for row in rows:
        dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        assert row[5:12:2] == [_backend.automatic(row[1], "cpu", dtype) for dtype in dtypes]


def test_the_reason_of_a_preference_stands_beside_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    text = output(monkeypatch, columns=400)
    rows = [line for line in text.splitlines() if "│ cpu " in line]
    for name, row in zip(_backend.op_names(), rows, strict=True):
        number = row.rstrip(" │").split()[-1]
        assert f"{number} native before torch, {preference(name, 'cpu').reason}" in text.splitlines()


def test_every_op_has_a_preference_and_every_preference_an_op() -> None:
    assert set(_PREFERENCE) == set(_backend.op_names())
    for devices in _PREFERENCE.values():
        assert set(devices) == {"cpu", "cuda"}
        for choice in devices.values():
            assert set(choice.order) < set(_backend.BACKENDS)
            assert choice.reason.startswith(("measured: ", "estimated ", "by design: "))


def test_a_measured_preference_names_a_stored_result() -> None:
    reasons = {choice.reason for devices in _PREFERENCE.values() for choice in devices.values()}
    files = {
        re.search(r"bench/results/[\w.]+", reason) for reason in reasons if reason.startswith("measured")
    }
    assert files
    assert all(found and (ROOT / found[0]).is_file() for found in files)


def test_a_missing_library_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_PACKAGE", tmp_path)
    _native.cpu_library_error.cache_clear()
    try:
        text = output(monkeypatch)
    finally:
        _native.cpu_library_error.cache_clear()
    assert "_native.so was not built: install prcl_fast again without PRCL_NO_NATIVE" in text
    row = next(line for line in text.splitlines() if " mutual_likelihood_score " in line).split()
    assert row[5] == "torch"  # op, device, float32 between bars


def test_a_missing_compiler_does_not_stop_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert "not found in CUDA_HOME, on PATH or in /usr/local/cuda" in output(monkeypatch)
