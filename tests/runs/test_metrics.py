"""Metrics of a run: one reader for figures, tables, resumes and the state of a run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prcl_fast.errors import InputError
from prcl_fast.runs.metrics import newest_records, read_lines, read_metrics, read_result

GOOD = '{"kind": "train", "iteration": 1, "loss": 2.5}\n'
EVAL = '{"kind": "eval", "iteration": 2, "miou": 50.0, "miou_student": 40.0}\n'
TORN = '{"kind": "train", "iter'


def write(folder: Path, text: str) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text(text)
    return path


def test_a_torn_last_line_is_left_out_by_all_readers(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + EVAL + TORN)
    assert [len(records) for records in (read_metrics(path).train, read_metrics(path).evaluations)] == [1, 1]
    assert [record["iteration"] for record in newest_records(path)] == [2, 1]
    assert (read_result(tmp_path).miou, read_result(tmp_path).iteration) == (50.0, 2)
    assert [line.torn for line in read_lines(path)] == [False, False, True]


def test_a_whole_last_line_counts_without_its_line_end(tmp_path: Path) -> None:
    assert newest_records(write(tmp_path, GOOD + EVAL.strip()))[0]["iteration"] == 2


def test_a_faulty_line_inside_is_named_and_skipped_by_the_state_of_a_run(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + TORN + "\n" + EVAL)
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: not a line of JSON$"):
        read_metrics(path)
    assert [record["iteration"] for record in newest_records(path)] == [2, 1]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("[" * 100_000, "not a line of JSON"),
        ('{"kind": "train", "iteration": ' + "9" * 5000 + "}", "not a line of JSON"),
        ('{"kind": "train", "iteration": ' + "9" * 400 + "}", "iteration: expected an integer, got 999"),
        ('{"kind": "train", "iteration": -1}', "iteration: expected an integer, got -1"),
        ('{"kind": "train", "iteration": true}', "iteration: expected an integer, got True"),
        (
            '{"kind": "train", "iteration": 1, "loss": 1' + "0" * 400 + "}",
            "loss: expected a number, got 1000",
        ),
        ('{"kind": "train", "iteration": 1, "seconds": 1e999}', "seconds: expected a number, got inf"),
        ('{"kind": "train", "iteration": 1, "loss": ' + "[" * 500 + "]" * 500 + "}", "got list"),
    ],
    ids=[
        "deep",
        "digits",
        "iteration beyond float64",
        "negative",
        "bool",
        "loss beyond float64",
        "endless",
        "list",
    ],
)
def test_a_hostile_line_is_one_short_line(tmp_path: Path, line: str, fault: str) -> None:
    path = write(tmp_path, GOOD + line + "\n")
    with pytest.raises(InputError) as caught:
        read_metrics(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert fault in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 120
    assert [record["iteration"] for record in newest_records(path)] == [1]


@pytest.mark.timeout(20)
def test_a_pipe_or_device_is_refused_unread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, kind in (("metrics.jsonl", "a pipe"), ("zero", "a device")):
        for read in (read_lines, read_metrics, newest_records):
            with pytest.raises(InputError, match=f"{name}: cannot be read as a metrics file: it is {kind}"):
                read(tmp_path / name)


def test_the_newest_records_of_a_long_file_are_read_from_its_end(tmp_path: Path) -> None:
    count = 20_000
    path = write(tmp_path, "".join(f'{{"kind": "train", "iteration": {i}}}\n' for i in range(count)))
    newest = [record["iteration"] for record in newest_records(path)]
    assert newest == list(range(count - 1, count - 1 - len(newest), -1))
    assert 100 < len(newest) < count


def test_missing_metrics_hold_no_records(tmp_path: Path) -> None:
    assert newest_records(tmp_path / "metrics.jsonl") == []
    with pytest.raises(InputError, match=r"no such file; a run writes it while it trains$"):
        read_lines(tmp_path / "metrics.jsonl")
