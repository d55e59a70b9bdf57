"""The bars of a sweep: whole names on a narrow terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from prcl_fast.console.plain import PlainConsole
from prcl_fast.sweep.config import read_sweep
from prcl_fast.sweep.progress import SweepProgress
from support.made_up_runs import write_sweep


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_names_and_counts_are_whole_on_a_terminal_of_any_usual_width(tmp_path: Path, width: int) -> None:
    axes = {"method": {"mean_teacher + classmix, strong": {}}, "labels": {"1/16 of the images": {}}}
    sweep = read_sweep(write_sweep(tmp_path, axes=axes), [])
    file = io.StringIO()
    with SweepProgress(sweep.runs, 3, PlainConsole(file=file, width=width, terminal=True)) as progress:
        for run in sweep.runs:
            progress.started(run)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    lines = re.split(r"[\r\n]+", text)
    assert "…" not in text
    assert max(map(len, lines)) <= width
    shown = "".join(line.split("━")[0].strip() for line in lines)
    for run in sweep.runs:
        assert run.name in shown
    assert "0/12" in text
    assert "3 of 5 runs" in text
