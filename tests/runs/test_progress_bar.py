"""Progress of a training: fits the terminal, names the losses by the papers' symbols, recent speed."""

from __future__ import annotations

import io
import re
from collections import deque
from pathlib import Path

import pytest

from prcl_fast.config import Config
from prcl_fast.console.plain import PlainConsole
from prcl_fast.engine.trainer import Trainer
from prcl_fast.runs.log import RunLog
from prcl_fast.runs.progress_bar import SYMBOLS, ProgressBar, Speed
from support.paths import PACKAGE

LOSSES = {"loss": 0.7517, "loss_supervised": 0.2178, "loss_unsupervised": 0.4961, "loss_contrast": 2.1609}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def screen(file: io.StringIO) -> list[str]:
    """The last lines on the terminal."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", text)
    lines = [line.rstrip() for line in text.split("\n") if line.strip()]
    first = max(index for index, line in enumerate(lines) if "/40000" in line)
    while first and "/40000" in lines[first - 1]:
        first -= 1
    return lines[first:]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(Speed.__init__, "__defaults__", (clock,))
    return clock


def bar_after(width: int, clock: Clock, file: io.StringIO, **more: float) -> ProgressBar:
    bar = ProgressBar(PlainConsole(file=file, width=width, terminal=True), start=11_990, total=40_000)
    bar.start()
    for iteration in range(11_991, 12_001):
        clock.now += 1 / 3.42
        bar.advance(iteration)
    bar.record({**LOSSES, "lr": 0.00641, **more})
    return bar


def test_an_evaluation_may_begin_while_the_thread_that_draws_reads_the_speed() -> None:
    class Cleared(deque[tuple[float, int]]):
        """Emptied by the other thread right after it was read for the first time."""

        def __len__(self) -> int:
            length = super().__len__()
            self.clear()
            return length

        def copy(self) -> deque[tuple[float, int]]:
            found = deque(iter(self))
            self.clear()
            return found

    speed = Speed()
    speed._marks = Cleared([(0.0, 1), (1.0, 2)])
    assert speed.per_second == 1.0


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_nothing_is_cut_on_a_terminal_of_any_usual_width(width: int, clock: Clock) -> None:
    file = io.StringIO()
    bar_after(width, clock, file).stop()
    lines = screen(file)
    text = "\n".join(lines)
    assert "…" not in text
    assert max(map(len, lines)) <= width
    assert "━" * (10 if width == 60 else 30) in text.replace("╸", "━").replace("╺", "━")
    for shown in ("12000/40000", "3.42 it/s", "lr 0.0064", "2:16:27 left"):
        assert shown in text
    assert lines[-1] == "L 0.75  Ls 0.22  Lu 0.50  Lc 2.16"


def test_losses_that_are_tiny_huge_or_not_finite_stay_short(clock: Clock) -> None:
    file = io.StringIO()
    bar = bar_after(80, clock, file)
    bar.record(
        {"loss": 1.7e10, "loss_supervised": 3.2e-7, "loss_unsupervised": 0.0, "loss_contrast": float("nan")}
    )
    bar.stop()
    assert screen(file)[-1] == "L 1.7e+10  Ls 3.2e-07  Lu 0.00  Lc nan"


def test_peak_memory_is_shown_where_it_is_known(clock: Clock) -> None:
    file = io.StringIO()
    bar_after(80, clock, file, peak_memory_mib=10_035).stop()
    assert screen(file)[-1].endswith("Lc 2.16  peak 9.8 GiB")


def test_an_evaluation_shows_its_images_in_place_of_the_losses(clock: Clock) -> None:
    file = io.StringIO()
    bar = bar_after(80, clock, file)
    bar.evaluating(12, 200)
    bar.stop()
    assert screen(file)[-1] == "evaluating, image 12 of 200"
    bar = bar_after(80, clock, file)
    bar.evaluating(200, 200)
    bar.evaluated()
    bar.stop()
    assert screen(file)[-1].startswith("L 0.75")


def test_the_speed_is_that_of_recent_steps_without_evaluations() -> None:
    clock = Clock()
    speed = Speed(clock)
    speed.advance(5_000)  # the first step after a resume, of which the duration is unknown
    assert speed.per_second is None
    for iteration in range(5_001, 5_011):
        clock.now += 10.0
        speed.advance(iteration)
    assert speed.per_second == pytest.approx(0.1)
    for iteration in range(5_011, 5_511):
        clock.now += 0.2
        speed.advance(iteration)
    assert speed.per_second == pytest.approx(5.0)
    speed.pause()
    clock.now += 1000.0
    assert speed.per_second == pytest.approx(5.0)
    for iteration in range(5_511, 5_520):
        speed.advance(iteration)
        clock.now += 0.5
    assert speed.per_second == pytest.approx(2.0)


def test_marks_of_fast_steps_take_bounded_memory() -> None:
    clock = Clock()
    speed = Speed(clock)
    for iteration in range(100_000):
        clock.now += 0.001
        speed.advance(iteration)
    assert len(speed._marks) < 400
    assert speed.per_second == pytest.approx(1000.0)


def test_a_pipe_gets_a_line_for_each_record_with_speed_learning_rate_and_time_left(
    tmp_path: Path, clock: Clock
) -> None:
    file = io.StringIO()
    with RunLog(tmp_path, start=0, total=100, console=PlainConsole(file=file, width=80)) as log:
        log.train(1, LOSSES | {"lr": 0.01})
        for iteration in range(1, 12):
            clock.now += 0.5
            log.advance(iteration)
        log.evaluating(3, 4)
        log.train(11, LOSSES | {"lr": 0.00641})
    first, second = file.getvalue().splitlines()
    losses = "loss 0.7517, loss_supervised 0.2178, loss_unsupervised 0.4961, loss_contrast 2.161"
    assert first == f"iteration 1: {losses}, lr 0.01"
    assert second == f"iteration 11: {losses}, 2 it/s, lr 0.0064, 00:44 left"


def test_every_loss_of_every_method_has_a_symbol() -> None:
    sources = [file.read_text() for file in (PACKAGE / "methods").glob("*.py")]
    terms = {name for source in sources for name in re.findall(r'"(loss(?:_[a-z_]+)?)"', source)}
    assert len(terms) > 5
    assert terms <= SYMBOLS.keys()


def test_a_training_shows_the_images_of_its_evaluations(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[int, int]] = []
    monkeypatch.setattr(ProgressBar, "evaluating", lambda bar, done, total: shown.append((done, total)))
    Trainer(tiny, PlainConsole(quiet=True)).run()
    assert shown == [(3, 3), (3, 3)]
