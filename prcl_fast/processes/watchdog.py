"""The watchdog of a rank: ends a run that cannot go on, with one message of the first cause.

The states of a rank:

    starting   no activity was begun with `at`: no limit
    working    `at` or `alive` was called within the last `stall_s` seconds, or the activity is patient
    stalled    neither was called. The rank with the fewest activities, for which the other ranks wait,
               reports it; where that rank cannot, another one does four beats later
    cut off    a rank sent no status for `gone_s` seconds, or the store does not answer; reported
    reported   the run's first report, of this rank or another one, is in the store
    left       the block ended without an error: the rank's silence is no loss. Rank 0 first waits for the
               other ranks, because the store may end with it
    ended      the process ends: with status 2 after an input error of any rank, else with 1

Every rank goes from stalled, cut off and reported to ended. With one process there is no store, and only
starting, working and stalled occur.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch.distributed as dist

from prcl_fast.console.text import printable
from prcl_fast.errors import InputError
from prcl_fast.processes.failures import first_line, is_collective_failure, report_of
from prcl_fast.processes.heartbeat import Heartbeat, Report
from prcl_fast.processes.peers import Peers

_OUTPUT_S = 5.0  # timeout of printing to a blocked stream, and of `details`


def print_error(text: str) -> None:
    """Prints on standard error at once."""
    print(text, file=sys.stderr, flush=True)


class Watchdog:
    """Watches this process, and with a store the other ranks of its run, from threads of its own.

    It ends the run where a rank makes no progress for `stall_s` seconds, sends no status for `gone_s`
    seconds, or has reported an error. One rank prints the first cause. All ranks end, also where their main
    thread is in a collective that cannot complete.

    With a store, an error that leaves the context is reported and ends the process; without, it passes.

    All ranks call `at` equally often and in the same order: what only one of them does is part of an activity
    that all begin. The rank with the fewest calls is the one for which the other ranks wait.

    Attributes:
        details: more words about a rank that makes no progress, such as the images in work.
        record: takes the run's first report, of whichever rank, before this process ends.
    """

    def __init__(
        self,
        rank: int = 0,
        world: int = 1,
        store: dist.Store | None = None,
        stall_s: float | None = None,
        say: Callable[[str], None] = print_error,
        end: Callable[[int], None] = os._exit,
        *,
        beat_s: float = 2.0,
        gone_s: float = 30.0,
    ) -> None:
        """
        Args:
            store: of this run alone; None where `world` is 1.
            stall_s: None sets no limit.
            say: prints a text on standard error.
            end: ends the process at once with a status.
            beat_s: seconds between two statuses.
        """
        self.rank, self.world, self.stall_s = rank, world, stall_s
        self.details: Callable[[], str] | None = None
        self.record: Callable[[str], None] | None = None
        self._say, self._end = say, end
        self._beat_s, self._gone_s = beat_s, gone_s
        self._calls, self._activity = 0, "starting"
        self._signs, self._patient = 0, False
        # Seconds that this process was running: one that was stopped and continued has not stalled.
        self._awake_s = 0.0
        self._stopped = threading.Event()
        self._printed = threading.Lock()
        self._reported = ""
        self._heartbeat: Heartbeat | None = None
        self._peers: Peers | None = None
        if store is not None:
            self._heartbeat = Heartbeat(
                rank, world, store, beat_s, lambda: (self._calls, self._activity), lambda: self._awake_s
            )
            self._peers = Peers(self._heartbeat, beat_s, lambda: self._calls)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, activity: str, *, patient: bool = False) -> None:
        """The main thread begins an activity, such as "waiting for data at iteration 41".

        Args:
            patient: it may take any time.
        """
        self._activity, self._patient = activity, patient
        self._calls += 1

    def alive(self, activity: str) -> None:
        """The main thread makes progress in what it began by `at`; ranks may call this differently often."""
        self._activity = activity
        self._signs += 1

    def report(self, message: str) -> bool:
        """Prints `message` if it is the run's first report; returns whether it is. All other ranks end."""
        return self._report(Report(self.rank, f"prcl: {message}", 1, everywhere=False))

    def __enter__(self) -> Watchdog:
        if self._heartbeat is not None:
            self._heartbeat.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        heartbeat = self._heartbeat
        if heartbeat is not None and isinstance(error, Exception):
            self._report_error(error)
            # The status of the cause, where this error follows from that of another rank.
            self._end_process(2 if isinstance(error, InputError) else self._status())
        self._stopped.set()
        self._thread.join(1.0)
        if heartbeat is None:
            return
        if error is None or (isinstance(error, SystemExit) and not error.code):
            heartbeat.leave(2 * self._beat_s)
            if self.rank == 0:
                self._hold_store(lambda: all(other.left for other in heartbeat.statuses.values()))
        elif not isinstance(error, Exception):
            # Interrupted by hand: the other ranks end silently.
            heartbeat.claim_report(Report(self.rank, "", 1, everywhere=False), 2 * self._beat_s)
        heartbeat.stop()

    def _report_error(self, error: Exception) -> None:
        if is_collective_failure(error):
            peers = self._peers
            message = first_line(error) if peers is None else peers.cause(error, self._activity)
            if message is not None:
                self.report(message)
            return
        self._report(report_of(error, self.rank))

    def _report(self, report: Report) -> bool:
        first = self._heartbeat is None or self._heartbeat.claim_report(report, 2 * self._beat_s)
        if first or report.everywhere:
            self._print(report.message)
        return first

    def _status(self) -> int:
        """The exit status of a process that ends for the run's report."""
        report = None if self._heartbeat is None else self._heartbeat.report
        return 1 if report is None else report.status

    def _print(self, text: str) -> None:
        if self._printed.acquire(blocking=False):  # never released: a process prints one report
            self._reported = text
            _within(_OUTPUT_S, lambda: self._say(text))

    def _end_process(self, status: int) -> None:
        heartbeat = self._heartbeat
        if heartbeat is not None and self.rank == 0:
            # Ranks that have only just started may have sent no status, but they count.
            left = [other for other in heartbeat.statuses.values() if other.left]
            self._hold_store(lambda: heartbeat.readers >= self.world - len(left))
        report = heartbeat.report.message if heartbeat is not None and heartbeat.report else self._reported
        if self.record is not None and report:
            _within(_OUTPUT_S, functools.partial(self.record, report.removeprefix("prcl: ")))
        _within(_OUTPUT_S, lambda: (sys.stdout.flush(), sys.stderr.flush()))
        for worker in multiprocessing.active_children():  # one that hangs would stay, and hold the terminal
            worker.kill()
        self._end(status)

    def _hold_store(self, enough: Callable[[], bool]) -> None:
        """Waits until the other ranks have read the store, which may end with this process, rank 0."""
        heartbeat = self._heartbeat
        until = time.monotonic() + min(5 * self._beat_s, self._gone_s)
        while (
            heartbeat is not None and time.monotonic() < until and not heartbeat.store_lost and not enough()
        ):
            heartbeat.exchange(self._beat_s)
            time.sleep(self._beat_s / 10)

    def _watch(self) -> None:
        tick = self._beat_s / 4
        progress, since = (0, 0), 0.0
        before = time.monotonic()
        while not self._stopped.wait(tick):
            now = time.monotonic()
            self._awake_s += min(now - before, 4 * tick)
            if self._peers is not None and now - before > 2 * self._beat_s:
                self._peers.paused = (self._awake_s, now - before)
            before = now
            if self._patient or (self._calls, self._signs) != progress:
                progress, since = (self._calls, self._signs), self._awake_s
            if self._run_is_over() or (self._calls and self._has_stalled(self._awake_s - since)):
                self._end_process(self._status())
                return

    def _run_is_over(self) -> bool:
        """Whether another rank has reported, or is lost, which is reported here."""
        heartbeat, peers = self._heartbeat, self._peers
        if heartbeat is None or peers is None:
            return False
        report = heartbeat.report
        if heartbeat.foreign is not None:
            text = (
                f"another program wrote {heartbeat.foreign} in the run's store; MASTER_PORT sets another port"
            )
            if heartbeat.foreign == "report":  # no rank can report any more
                self._print(f"prcl: {text}")
            else:
                self.report(text)
            return True
        if report is not None:
            if report.rank == self.rank:
                return False  # the thread that has reported ends the process
            # A launcher kills all ranks when one ends: the report must be printed before.
            time.sleep(min(1.0, self._beat_s))
            if report.everywhere:
                self._print(printable(report.message))
            return True
        if not peers.store_answers(self._gone_s):
            if 0 in heartbeat.statuses and heartbeat.statuses[0].left:
                return False
            message = peers.lost_store()
            if message is not None:
                self._print(f"prcl: {message}")
            return True
        silent = peers.silent(self._gone_s)
        if silent:
            self.report(peers.gone(silent))
        return bool(silent)

    def _has_stalled(self, quiet_s: float) -> bool:
        """Whether this rank has stalled and its report, or another rank's, is made."""
        if self.stall_s is None or quiet_s < self.stall_s:
            return False
        heartbeat, peers, text = self._heartbeat, self._peers, f"no progress for {self.stall_s:g} s"
        last, alike = self.rank, False
        if heartbeat is not None and peers is not None:
            heartbeat.read_all = True
            if not heartbeat.exchange(2 * self._beat_s) and heartbeat.report is None:
                # Without the store no rank can tell which one is behind.
                message = peers.lost_store()
                if message is not None:
                    self._print(f"prcl: {text}: {message}")
                return True
            last, alike = peers.furthest_behind()
        if peers is not None and last != self.rank:
            if quiet_s < self.stall_s + 4 * self._beat_s:
                return False  # the rank that is furthest behind has more detail, so it reports first
            text += f", waiting for rank {last}, which is {peers.doing(last)}"
        else:
            who = (
                f"all {self.world} processes are " if alike else f"rank {self.rank} is " if heartbeat else ""
            )
            more = _within(_OUTPUT_S, self.details) if self.details else None
            text += f", {who}{self._activity}" + (f" ({more})" if more else "")
        self.report(f"{text}; train.stall_timeout sets how long that may take")
        return True


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """The result of `function`; None where it takes longer, or raises."""
    result: list[Any] = []

    def call() -> None:
        with contextlib.suppress(Exception):
            result.append(function())

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0] if result else None
