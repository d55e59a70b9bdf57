"""The log of a run: metrics.jsonl and TensorBoard, after a resume and on a failing disk."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prcl_fast.config import Config
from prcl_fast.engine.trainer import Trainer
from prcl_fast.errors import RunError
from prcl_fast.runs.log import RunLog
from support.run_folders import file_size_limit

QUIET = Console(quiet=True)


def open_log(folder: Path, start: int = 0) -> RunLog:
    return RunLog(folder, start=start, total=10, console=QUIET)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars as TensorBoard reads them."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_a_record_goes_to_both_files_with_its_numbers(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.train(2, {"loss": 0.5, "loss_contrast": float("nan"), "anchors": [3, 0], "note": "alone"})
        log.evaluation(4, {"miou": 50.0, "iou": {"sky": 25.0, "pole": float("nan")}})
    assert records(tmp_path) == [
        {
            "kind": "train",
            "iteration": 2,
            "loss": 0.5,
            "loss_contrast": None,
            "anchors": [3, 0],
            "note": "alone",
        },
        {"kind": "eval", "iteration": 4, "miou": 50.0, "iou": {"sky": 25.0, "pole": None}},
    ]
    assert board(tmp_path) == {
        "train/loss": [(2, 0.5)],
        "eval/miou": [(4, 50.0)],
        "eval/iou/sky": [(4, 25.0)],
    }


def test_a_run_that_goes_on_hides_what_lies_after_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_log(tmp_path) as log:
        for iteration in (2, 4, 6):
            log.train(iteration, {"loss": 1.0})
    monkeypatch.setattr("time.time", lambda: 4e9)  # a later second, so a file after the first one
    with open_log(tmp_path, start=4) as log:
        log.train(6, {"loss": 2.0})
    assert [(record["iteration"], record["loss"]) for record in records(tmp_path)] == [(2, 1), (4, 1), (6, 2)]
    assert board(tmp_path) == {"train/loss": [(2, 1.0), (4, 1.0), (6, 2.0)]}
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


@pytest.mark.parametrize(
    "damaged",
    [b'{"kind": "train", "iter', b"\xff\xfe\x00", bytes(64), b'{"iteration": "x"}', b"[1]"],
    ids=repr,
)
def test_a_damaged_line_of_the_former_process_is_dropped(tmp_path: Path, damaged: bytes) -> None:
    good = b'{"kind": "train", "iteration": 2, "note": "\xc3\xa9"}'
    (tmp_path / "metrics.jsonl").write_bytes(good + b"\n" + damaged + b"\n" + good + b"\n" + damaged)
    with open_log(tmp_path, start=4):
        pass
    assert (tmp_path / "metrics.jsonl").read_bytes() == (good + b"\n") * 2
    assert not list(tmp_path.glob("*.tmp"))


def test_no_thread_writes_behind_the_run(tmp_path: Path) -> None:
    before = threading.active_count()
    with open_log(tmp_path) as log:
        log.train(2, {"loss": 1.0})
        log.flush()
        assert threading.active_count() == before
        assert board(tmp_path) == {"train/loss": [(2, 1.0)]}


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (".", r"metrics\.jsonl: cannot be written: No such file or directory$"),
        ("tensorboard", r"tensorboard/events[^:]*: cannot be written: No such file or directory$"),
    ],
)
def test_a_folder_deleted_under_the_run_ends_it_with_the_files_name(
    tmp_path: Path, gone: str, message: str
) -> None:
    (tmp_path / "run").mkdir()
    with open_log(tmp_path / "run") as log:
        log.train(2, {"loss": 1.0})
        shutil.rmtree(tmp_path / "run" / gone)
        with pytest.raises(RunError, match=message):
            log.train(4, {"loss": 1.0})
        with pytest.raises(RunError, match=message):
            log.flush()
    assert not (tmp_path / "run" / gone).exists()


def test_metrics_over_the_size_limit_end_the_run_and_the_cut_line_is_dropped_on_resume(
    tmp_path: Path,
) -> None:
    with open_log(tmp_path) as log:
        log.train(2, {"loss": 1.0, "note": "a" * 100})
        size = (tmp_path / "metrics.jsonl").stat().st_size
        with (
            file_size_limit(size + 20),
            pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written: File too large$"),
        ):
            log.train(4, {"loss": 1.0})
    assert (tmp_path / "metrics.jsonl").stat().st_size == size + 20
    with open_log(tmp_path, start=4):
        pass
    assert [record["iteration"] for record in records(tmp_path)] == [2]


def test_events_over_the_size_limit_end_the_run(tmp_path: Path) -> None:
    values = {f"loss_{index}": 1.0 for index in range(3)}
    with open_log(tmp_path) as log:
        log.train(2, values)
        event_file = next((tmp_path / "tensorboard").iterdir())
        shutil.copy(
            "/dev/null", tmp_path / "metrics.jsonl"
        )  # the shorter one of the two is not the first to fail
        with (
            file_size_limit(event_file.stat().st_size + 10),
            pytest.raises(RunError, match=rf"{event_file.name}: cannot be written: File too large$"),
        ):
            log.train(4, values)


@pytest.mark.parametrize("taken", ["metrics.jsonl", "tensorboard"])
def test_a_name_that_something_else_has_taken_is_named_at_the_start(tmp_path: Path, taken: str) -> None:
    if taken == "tensorboard":
        (tmp_path / taken).write_text("")
    else:
        (tmp_path / taken).mkdir()
    reason = {
        "metrics.jsonl": "read as a metrics file: it is a folder",
        "tensorboard": "written: it is no folder",
    }
    with pytest.raises(RunError, match=f"{taken}: cannot be {reason[taken]}"):
        open_log(tmp_path, start=2)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_whose_folder_is_deleted_ends_in_one_line_and_makes_no_new_one(tiny: Config) -> None:
    trainer = Trainer(tiny, QUIET)
    losses = trainer.method.losses

    def losses_without_folder(batch, step):
        if trainer.iteration == 3:
            shutil.rmtree(tiny.output)
        return losses(batch, step)

    trainer.method.losses = losses_without_folder
    with pytest.raises(RunError, match=r"cannot be written: No such file or directory"):
        trainer.run()
    assert trainer.iteration == 4
    assert not tiny.output.exists()
