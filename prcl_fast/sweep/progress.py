"""Progress of a sweep on standard error: bars on a terminal, else one line for each event."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from prcl_fast.console.plain import PlainConsole
from prcl_fast.console.text import duration, printable
from prcl_fast.runs.folder import newest_iteration
from prcl_fast.runs.metrics import RunResult
from prcl_fast.sweep.config import SweepRun

_BAR_WIDTH = 20  # columns at most
# Seconds over which the speed is averaged; iterations are known only every train.log_every.
_SPEED_PERIOD = 1200.0


class SweepProgress:
    """The progress of `runs`, of a sweep that has `done` further runs already finished."""

    def __init__(self, runs: Sequence[SweepRun], done: int, console: PlainConsole) -> None:
        self._console = console
        self._ended, self._runs = done, done + len(runs)
        self._bars = Progress(
            # A long name is folded, and the bar takes what is left.
            TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold")),
            BarColumn(_BAR_WIDTH),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            console=console,
            speed_estimate_period=_SPEED_PERIOD,
            disable=not console.is_terminal,
        )
        self._iterations = {run.name: newest_iteration(run.config) for run in runs}
        total = sum(run.config.train.iterations for run in runs)
        self._all = self._bars.add_task(self._count(), total=total, completed=sum(self._iterations.values()))
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> SweepProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:  # otherwise it would print an empty line
            self._bars.stop()

    def started(self, run: SweepRun) -> None:
        """The training of `run` begins or continues."""
        begin = self._iterations[run.name]
        self._tasks[run.name] = self._bars.add_task(
            f"  {printable(run.name)}", total=run.config.train.iterations, completed=begin
        )
        if not self._console.is_terminal:
            continuing = f", continuing after iteration {begin}" if begin else ""
            self._say(f"started {run.name}{continuing}")

    def working(self, runs: Sequence[SweepRun]) -> None:
        """Reads the iterations of `runs`."""
        if not self._console.is_terminal:
            return
        for run in runs:
            self._iterations[run.name] = newest_iteration(run.config)
            self._bars.update(self._tasks[run.name], completed=self._iterations[run.name])
        self._bars.update(self._all, completed=sum(self._iterations.values()))

    def ended(self, run: SweepRun, failure: str | None, result: RunResult | None) -> None:
        """The process of `run` ended; without `failure` and `result` it was stopped."""
        if run.name in self._tasks:
            self._bars.remove_task(self._tasks.pop(run.name))
        if failure is not None:
            self._say(f"failed {run.name}: {failure}")
        elif result is None:
            self._say(f"stopped {run.name} at iteration {newest_iteration(run.config)}")
        else:
            self._ended += 1
            miou = "no mIoU" if result.miou is None else f"mIoU {result.miou:.1f}"
            time = "" if result.seconds is None else f", {duration(result.seconds)}"
            self._say(f"done {run.name}: {miou}{time}; {self._count()}")
        self._bars.update(self._all, description=self._count())

    def _count(self) -> str:
        return f"{self._ended} of {self._runs} runs"

    def _say(self, line: str) -> None:
        self._console.print(line)
