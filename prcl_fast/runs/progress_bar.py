"""Progress of a training: two lines at the bottom of a terminal, and the text of plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from prcl_fast.console.plain import PlainConsole

# The papers' symbols of the losses, which have no room for their names on a terminal.
SYMBOLS = {
    "loss": "L",
    "loss_supervised": "Ls",
    "loss_unsupervised": "Lu",
    "loss_contrast": "Lc",
    "loss_cross": "Lcross",
    "loss_activation": "La",
    "loss_prototype_supervised": "Lps",
    "loss_prototype_unsupervised": "Lpu",
}
_BAR_WIDTH = 40  # columns at most; less where the terminal is narrow
_PERIOD_S = 30.0  # over which the speed is averaged
_MARK_S = 0.1  # between two marks


class Speed:
    """Steps per second over the last half minute; evaluations and what a former process did do not count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks: deque[tuple[float, int]] = deque()
        self._former: float | None = None

    def advance(self, iteration: int) -> None:
        """`iteration` steps are finished now."""
        now = self._clock()
        if len(self._marks) > 1 and now - self._marks[-2][0] < _MARK_S:
            self._marks.pop()
        self._marks.append((now, iteration))
        while len(self._marks) > 2 and now - self._marks[1][0] >= _PERIOD_S:
            self._marks.popleft()

    def pause(self) -> None:
        """The time from here to the next finished step does not count."""
        self._former = self.per_second
        self._marks.clear()

    @property
    def per_second(self) -> float | None:
        """None until two steps are finished."""
        marks = self._marks.copy()  # the thread that draws reads while the training changes them
        if len(marks) < 2 or marks[-1][0] <= marks[0][0]:
            return self._former
        (start, first), (end, last) = marks[0], marks[-1]
        return (last - first) / (end - start)


class ProgressBar:
    """Bar, iteration, speed, learning rate, time left and losses of a run; nothing where no terminal is.

    The time left is that of the remaining steps, without evaluations.

    Args:
        start: iterations done before.
        total: iterations of the run.
    """

    def __init__(self, console: PlainConsole, *, start: int, total: int) -> None:
        self._total = total
        self._shown = console.is_terminal
        self._speed = Speed()
        self._lr = ""
        self._bar = _TwoLines(
            BarColumn(_BAR_WIDTH),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            _Figures(lambda done: self._figures(done)),
            console=console,
            disable=not self._shown,
        )
        self._task = self._bar.add_task("", total=total, completed=start)

    def start(self) -> None:
        """Shows it."""
        if self._shown:
            self._bar.start()

    def stop(self) -> None:
        """Leaves its last state on the terminal."""
        if self._shown:  # otherwise it would print an empty line
            self._bar.stop()

    def advance(self, iteration: int) -> None:
        """`iteration` steps are finished."""
        self._speed.advance(iteration)
        self._bar.update(self._task, completed=iteration)

    def record(self, values: Mapping[str, Any]) -> None:
        """Shows the losses and the learning rate of a record, and peak memory where it has one."""
        parts = [f"{SYMBOLS.get(key, key)} {_short(values[key])}" for key in values if key.startswith("loss")]
        if "peak_memory_mib" in values:
            parts.append(f"peak {values['peak_memory_mib'] / 1024:.1f} GiB")
        self._lr = _lr(values)
        self._bar.status = "  ".join(parts)

    def evaluating(self, done: int, total: int) -> None:
        """An evaluation has finished `done` of `total` images."""
        self._speed.pause()
        self._bar.activity = f"evaluating, image {done} of {total}"

    def evaluated(self) -> None:
        """The evaluation is over."""
        self._bar.activity = ""

    def line(self, iteration: int, values: Mapping[str, Any]) -> str:
        """The line of a record for a log: each loss with its name, learning rate, speed, time left."""
        losses = [f"{key} {values[key]:.4g}" for key in values if key.startswith("loss")]
        return ", ".join((*losses, *self._figures(iteration, _lr(values))))

    def _figures(self, iteration: float, lr: str | None = None) -> list[str]:
        speed, lr = self._speed.per_second, self._lr if lr is None else lr
        if speed is None:
            return [lr] if lr else []
        left = _clock((self._total - iteration) / speed) + " left"
        return [_speed(speed), lr, left] if lr else [_speed(speed), left]


class _TwoLines(Progress):
    """The bar and its figures, and below them what the process does, or the losses."""

    status = ""
    activity = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.activity or self.status, overflow="fold")


class _Figures(ProgressColumn):
    def __init__(self, figures: Callable[[float], list[str]]) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._figures = figures

    def render(self, task: Task) -> Text:
        return Text("  ".join(self._figures(task.completed)), no_wrap=True)


def _lr(values: Mapping[str, Any]) -> str:
    return f"lr {values['lr']:.2g}" if "lr" in values else ""


def _speed(per_second: float) -> str:
    return f"{per_second:.3g} it/s" if per_second >= 0.1 else f"{1 / per_second:.3g} s/it"


def _short(value: float) -> str:
    """Two decimals; two digits of a number that is very small or large."""
    plain = value == 0 or 0.01 <= abs(value) < 1000 or not math.isfinite(value)
    return f"{value:.2f}" if plain else f"{value:.1e}"


def _clock(seconds: float) -> str:
    """H:MM:SS, or MM:SS below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
