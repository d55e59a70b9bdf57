"""`bench memory-bank`: time and state of each candidate, sizes of the banks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.step.memory_bank import BANKS, candidates, main
from prcl_fast.losses import FeatureBank


def test_every_candidate_is_timed_and_its_state_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--device", "cpu", "--rounds", "2", "--json", str(tmp_path / "result.json")])
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert rows.keys() == candidates("small").keys()
    assert all(0 < row["ms_20"] <= row["ms"] <= row["ms_80"] for row in rows.values())
    added = rows["bank of 1024, 4 drawn"]["state_bytes"] - rows["neither"]["state_bytes"]
    assert added == FeatureBank(6, 64, 64, size=1024).nbytes
    assert rows["bank of 8192, 64 drawn"]["state_bytes"] > 7 * added
    shown = capsys.readouterr().out
    assert "bank of 8192" in shown
    assert "memory MB" in shown


def test_banks_have_the_sizes_of_the_paper_where_they_are_not_small() -> None:
    """IJCV, table 7."""
    assert BANKS == (30000, 65536)
    kept = {options.get("memory_bank", 0) for options in candidates("voc").values()}
    assert kept == {0, 30000, 65536}
