"""The provenance of a run: a record of each command that has trained it, on disk and in the checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from prcl_fast import __version__
from prcl_fast.config import Config, override_config
from prcl_fast.engine.resume import AllowedChanges
from prcl_fast.engine.trainer import Trainer
from prcl_fast.runs.checkpoint import load_checkpoint
from prcl_fast.runs.provenance import add_record, read_records
from support.stub_networks import small_backbones

QUIET = Console(quiet=True)


def test_each_command_that_trains_leaves_a_record_also_in_the_checkpoint(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET", "precious")
    with small_backbones():
        monkeypatch.setattr(sys, "argv", ["prcl", "train", "my run.yaml"])
        Trainer(tiny, QUIET).run()
        Trainer(tiny, QUIET).run()  # reports the finished run
        monkeypatch.setattr(sys, "argv", ["prcl", "train", "my run.yaml", "--extend"])
        more = override_config(tiny, ["train.iterations=8"])
        Trainer(more, QUIET, allowed=AllowedChanges(extend=True)).run()
    first, second = read_records(tiny.output)
    assert first["command"] == "prcl train 'my run.yaml'"
    assert second["command"] == "prcl train 'my run.yaml' --extend"
    assert [(record["iteration"], record["total"]) for record in (first, second)] == [(0, 6), (6, 8)]
    assert first["versions"]["prcl_fast"] == __version__
    assert first["versions"]["torch"] == str(torch.__version__)
    assert first["machine"]["cores"] >= 1
    assert (first["device"], first["processes"]) == ("cpu", 1)
    assert first["data"]["data.labeled"].startswith("4 images, list ")
    assert load_checkpoint(tiny.output / "last.pt")["starts"] == [first, second]
    assert load_checkpoint(tiny.output / "last-1.pt")["starts"] == [first]
    assert "precious" not in (tiny.output / "provenance.jsonl").read_text()


def test_a_cut_line_is_left_out_and_a_run_without_the_file_has_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path) == []
    add_record(tmp_path, {"iteration": 0})
    path = tmp_path / "provenance.jsonl"
    path.write_text(path.read_text() + '[1]\n{"iteration": ')
    assert read_records(tmp_path) == [{"iteration": 0}]
    add_record(tmp_path, {"iteration": 4})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"iteration": 0},
        {"iteration": 4},
    ]
