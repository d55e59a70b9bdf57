"""The comparison of virtual negatives with a memory bank measures each candidate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.memory_bank import CANDIDATES, main


def test_every_candidate_is_timed_and_its_state_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--device", "cpu", "--rounds", "2", "--json", str(tmp_path / "result.json")])
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert rows.keys() == CANDIDATES.keys()
    assert all(0 < row["ms_20"] <= row["ms"] <= row["ms_80"] for row in rows.values())
    classes, dim, places = 6, 64, 1024 + 1
    added = rows["bank of 1024, 4 drawn"]["state_bytes"] - rows["neither"]["state_bytes"]
    assert added == classes * (places * dim * 4 + 8)  # features, and how many there are
    assert "bank of 8192" in capsys.readouterr().out
