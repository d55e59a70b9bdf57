"""The text log of a run: what the console says also stands in log.txt, with its time."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest

from prcl_fast.console.plain import PlainConsole
from prcl_fast.errors import InputError, RunError, WriteError
from prcl_fast.runs.log import RunLog
from prcl_fast.runs.text_log import TextLog
from support.run_folders import file_size_limit

ENTRY = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d "


def recording(terminal: bool | None = None) -> tuple[TextLog, io.StringIO]:
    file = io.StringIO()
    return TextLog(PlainConsole(file=file, width=40, terminal=terminal)), file


def entries(folder: Path) -> list[str]:
    """The lines of log.txt after the first, which is the command, without their times."""
    lines = (folder / "log.txt").read_text().splitlines()
    assert all(re.match(ENTRY, line) for line in lines)
    lines = [re.sub(ENTRY, "", line) for line in lines]
    assert lines[0].startswith("info: command: ")
    return lines[1:]


def test_lines_go_to_both_places_as_they_are_also_those_from_before_the_folder(tmp_path: Path) -> None:
    log, file = recording()
    lines = ["runs/[/x] [red] :skull:", "a" * 100, "\u00dcbung"]
    log.say(lines[0])
    assert not list(tmp_path.iterdir())
    log.open(tmp_path)
    for line in lines[1:]:
        log.say(line)
    log.error("one line")
    assert file.getvalue().splitlines() == lines
    assert entries(tmp_path) == [*(f"info: {line}" for line in lines), "error: one line"]


def test_a_second_start_goes_on_in_the_same_file(tmp_path: Path) -> None:
    for line in ("first", "second"):
        log, _ = recording()
        log.open(tmp_path)
        log.say(line)
    text = (tmp_path / "log.txt").read_text()
    assert text.count("info: command: ") == 2
    assert text.index("first") < text.index("second")


@pytest.mark.parametrize("terminal", [False, True])
def test_the_records_of_a_run_stand_in_the_file_also_where_a_bar_shows_them(
    tmp_path: Path, terminal: bool
) -> None:
    log, _ = recording(terminal)
    log.open(tmp_path)
    with RunLog(tmp_path, start=0, total=4, console=log) as records:
        records.train(2, {"loss": 0.5, "note": "first"})
        records.train(4, {"loss": 0.25, "note": "at chance"})
        records.evaluation(4, {"miou": 50.0, "note": "not learned"})
    assert entries(tmp_path) == [
        "info: iteration 2: loss 0.5",
        "info: iteration 4: loss 0.25",
        "info: iteration 4: at chance",
        "info: iteration 4: miou 50.00",
        "info: iteration 4: not learned",
    ]


@pytest.mark.parametrize(
    ("raised", "entry"),
    [
        (InputError("a.yaml: unknown\nkey"), "error: a.yaml: unknown key"),
        (RunError("stopped"), "error: stopped"),
        (KeyboardInterrupt(), "error: interrupted"),
    ],
)
def test_an_error_that_ends_the_run_is_recorded_and_passes(
    tmp_path: Path, raised: BaseException, entry: str
) -> None:
    log, file = recording()
    log.open(tmp_path)
    with pytest.raises(type(raised)), log.errors():
        raise raised
    assert entries(tmp_path) == [entry]
    assert not file.getvalue()  # the command line prints it


def test_a_fault_of_the_program_is_recorded_with_its_traceback(tmp_path: Path) -> None:
    log, _ = recording()
    log.open(tmp_path)
    with pytest.raises(ZeroDivisionError), log.errors():
        print(1 / 0)
    text = (tmp_path / "log.txt").read_text()
    assert "error: Traceback (most recent call last):" in text
    assert text.endswith("ZeroDivisionError: division by zero\n")


def test_a_full_disk_is_said_once_and_does_not_end_the_run(tmp_path: Path) -> None:
    log, file = recording()
    log.open(tmp_path)
    size = (tmp_path / "log.txt").stat().st_size
    with file_size_limit(size + 10):
        for line in ("one", "two", "three"):
            log.say(line)
    said = file.getvalue().splitlines()
    path = tmp_path / "log.txt"
    assert said == [
        "one",
        f"{path}: cannot be written: File too large; the lines that follow are only printed",
        "two",
        "three",
    ]
    assert log._waiting is None  # nothing is kept for a file that is not written


def test_a_link_in_the_place_of_the_log_is_refused_and_its_target_left_alone(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").symlink_to(victim)
    log, _ = recording()
    with pytest.raises(WriteError, match=r"log\.txt: cannot be written: it is a link$"):
        log.open(tmp_path / "run")
    os.unlink(tmp_path / "run" / "log.txt")
    os.mkfifo(tmp_path / "run" / "log.txt")
    with pytest.raises(WriteError, match=r"log\.txt: cannot be written: it is a pipe$"):
        log.open(tmp_path / "run")
    assert victim.read_text() == "precious"


def test_an_error_that_is_reported_twice_is_recorded_once(tmp_path: Path) -> None:
    log, _ = recording()
    log.open(tmp_path)
    with pytest.raises(RunError), log.errors():
        raise RunError("stopped")
    log.error("stopped")  # as the watchdog of several processes does
    assert entries(tmp_path) == ["error: stopped"]


def test_with_several_processes_an_unexpected_exception_is_left_to_the_report_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prcl_fast.runs.text_log.world_size", lambda: 2)
    log, _ = recording()
    log.open(tmp_path)
    with pytest.raises(RuntimeError), log.errors():
        raise RuntimeError("connection closed by peer")
    assert entries(tmp_path) == []
