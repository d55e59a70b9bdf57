"""Ends a run that cannot go on, and says why once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch.distributed as dist

from prcl_fast.errors import InputError, RunError
from prcl_fast.processes.board import Board
from prcl_fast.processes.rendezvous import first_line

_SAYING_S = 5.0  # a terminal or a pipe that takes no more text does not keep a run from ending


class Watchdog:
    """Watches this process, and with a store the others of its run, from threads of its own.

    The run is ended with status 1 where a process makes no progress for `stall_s` seconds, is not heard of
    for `gone_s` seconds, or has reported an error. The first cause is said on one process; all end, also
    where their main thread waits for a process that will not come.

    In a run of several processes an error that leaves the context is reported so and ends the process; with
    one process it passes.

    All processes call `at` as often and in the same order: what only one of them does is part of something
    that all begin. The one that has called it least often is the one that the others wait for.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        store: dist.Store | None,
        stall_s: float | None,
        say: Callable[[str], None],
        end: Callable[[int], None] = os._exit,
        *,
        details: Callable[[], str] | None = None,
        beat_s: float = 2.0,
        gone_s: float = 30.0,
    ) -> None:
        """
        Args:
            store: of this run alone; None where `world` is 1.
            stall_s: None: a process may take as long as it wants.
            say: shows a text on standard error.
            end: ends the process at once with a status.
            details: what else there is to say of a process that makes no progress.
            beat_s: how often the processes tell each other that they live.
        """
        self.rank, self.world, self.stall_s, self.details = rank, world, stall_s, details
        self._say, self._end = say, end
        self._beat_s, self._gone_s = beat_s, gone_s
        self._calls, self._what = 0, "starting"
        self._signs, self._patient = 0, False
        self._awake = (
            0.0  # seconds that this process was running: a stopped and continued one has not stalled
        )
        self._stopped = threading.Event()
        self._said = threading.Lock()
        self._board: Board | None = None
        if store is not None:
            self._board = Board(
                rank, world, store, beat_s, lambda: (self._calls, self._what), lambda: self._awake
            )
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, what: str, *, patient: bool = False) -> None:
        """The main thread begins `what`, such as "waiting for data at iteration 41".

        Args:
            patient: it may take as long as it wants.
        """
        self._what, self._patient = what, patient
        self._calls += 1

    def alive(self, what: str) -> None:
        """The main thread goes on with what it began by `at`, and is now `what`: each process as it likes."""
        self._what = what
        self._signs += 1

    def report(self, message: str) -> bool:
        """Shows `message` if it is the run's first report; whether it was. All other processes end."""
        return self._report(f"prcl: {message}")

    def lost(self, error: BaseException) -> str | None:
        """Why a collective raised `error`: one line, or None where another process says it."""
        board = self._board
        if board is None:
            return first_line(error)
        board.read_all = True
        until = time.monotonic() + 2.5 * self._beat_s
        while time.monotonic() < until and not board.lost and board.first is None:
            board.exchange(self._beat_s)
            time.sleep(self._beat_s / 10)
        if board.first is not None:
            return None
        if board.lost:
            return self._lost_store()
        gone = self._unheard(2 * self._beat_s)
        if gone:
            return _gone(gone)
        last, alike = self._last()
        if last != self.rank and not alike:
            return f"a collective timed out, waiting for rank {last}, which is {board.notes[last].what}"
        return f"rank {self.rank}: a collective failed while {self._what}: {first_line(error)}"

    def __enter__(self) -> Watchdog:
        if self._board is not None:
            self._board.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        board = self._board
        if board is not None and isinstance(error, Exception):
            self._say_error(error)
            self._leave_process(2 if isinstance(error, InputError) else 1)
        self._stopped.set()
        self._thread.join(1.0)
        if board is None:
            return
        if error is None or (isinstance(error, SystemExit) and not error.code):
            board.leave(2 * self._beat_s)
            if self.rank == 0:
                self._hold_store(lambda: len(self._present()) == 1)
        elif not isinstance(error, Exception):
            board.claim("", 2 * self._beat_s)  # interrupted by hand: the others end, with nothing to say
        board.stop()

    def _say_error(self, error: Exception) -> None:
        if _is_collective_failure(error):
            message = self.lost(error)
            if message is not None:
                self.report(message)
        elif isinstance(error, (InputError, RunError)):
            self.report(str(error))
        else:
            self._report("".join(traceback.format_exception(error)).rstrip())

    def _report(self, text: str) -> bool:
        first = self._board is None or self._board.claim(text, 2 * self._beat_s)
        if first:
            self._show(text)
        return first

    def _show(self, text: str) -> None:
        if self._said.acquire(blocking=False):  # never released: a process says one thing
            _within(_SAYING_S, lambda: self._say(text))

    def _leave_process(self, status: int) -> None:
        board = self._board
        if board is not None and self.rank == 0:
            # Of some, nothing may have been heard so far: they have only just come.
            left = [note for note in board.notes.values() if note.left]
            self._hold_store(lambda: board.seen >= self.world - len(left))
        _within(_SAYING_S, lambda: (sys.stdout.flush(), sys.stderr.flush()))
        for worker in multiprocessing.active_children():  # one that hangs would stay, and hold the terminal
            worker.kill()
        self._end(status)

    def _hold_store(self, enough: Callable[[], bool]) -> None:
        """The store may end with this process, rank 0: the others must first have read what is in it."""
        until = time.monotonic() + min(5 * self._beat_s, self._gone_s)
        while self._board is not None and time.monotonic() < until and not self._board.lost and not enough():
            self._board.exchange(self._beat_s)
            time.sleep(self._beat_s / 10)

    def _watch(self) -> None:
        tick = self._beat_s / 4
        progress, since = (0, 0), 0.0
        before = time.monotonic()
        while not self._stopped.wait(tick):
            now = time.monotonic()
            self._awake += min(now - before, 4 * tick)
            before = now
            if self._patient or (self._calls, self._signs) != progress:
                progress, since = (self._calls, self._signs), self._awake
            if self._is_over() or (self._calls and self._has_stalled(self._awake - since)):
                self._leave_process(1)
                return

    def _is_over(self) -> bool:
        """Whether another process has reported, or one is lost, which is said."""
        board = self._board
        if board is None:
            return False
        if board.first is not None:
            if board.first[0] == self.rank:
                return False  # the thread that has reported ends the process
            time.sleep(min(1.0, self._beat_s))  # a launcher kills all when one ends: first let it be said
            return True
        if board.lost or self._awake - board.talked > self._gone_s:
            if 0 in board.notes and board.notes[0].left:
                return False
            message = self._lost_store()
            if message is not None:
                self._show(f"prcl: {message}")
            return True
        gone = self._unheard(self._gone_s)
        if gone:
            self.report(_gone(gone))
        return bool(gone)

    def _has_stalled(self, quiet_s: float) -> bool:
        if self.stall_s is None or quiet_s < self.stall_s:
            return False
        board, text = self._board, f"no progress for {self.stall_s:g} s"
        last, alike = self.rank, False
        if board is not None:
            board.read_all = True
            board.exchange(2 * self._beat_s)
            last, alike = self._last()
        if last != self.rank:
            if quiet_s < self.stall_s + 4 * self._beat_s:
                return False  # that one knows more of it
            assert board is not None
            text += f", waiting for rank {last}, which is {board.notes[last].what}"
        else:
            who = f"all {self.world} processes are " if alike else f"rank {self.rank} is " if board else ""
            more = _within(_SAYING_S, self.details) if self.details else None
            text += f", {who}{self._what}" + (f" ({more})" if more else "")
        self.report(f"{text}; train.stall_timeout sets how long that may take")
        return True

    def _present(self) -> dict[int, int]:
        """The calls of each rank that has not left."""
        calls = {self.rank: self._calls}
        if self._board is not None:
            calls |= {rank: note.calls for rank, note in list(self._board.notes.items()) if not note.left}
        return calls

    def _last(self) -> tuple[int, bool]:
        """The rank that is furthest back, the lowest of several; and whether all are alike."""
        calls = self._present()
        return min(sorted(calls), key=calls.__getitem__), len(set(calls.values())) == 1

    def _unheard(self, seconds: float) -> list[int]:
        assert self._board is not None
        heard = self._board.heard
        return [r for r in self._present() if r in heard and self._awake - heard[r] > seconds]

    def _lost_store(self) -> str | None:
        # Without a store nobody can agree on who says it. The last rank is the least likely to have been on
        # the machine of rank 0.
        return "lost rank 0, or the machine that started it" if self.rank == self.world - 1 else None


def _gone(ranks: list[int]) -> str:
    names = ", ".join(str(rank) for rank in sorted(ranks))
    return f"rank {names} is gone (killed, out of memory, or its machine lost)"


def _is_collective_failure(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """What `function` returns; None where that takes longer, or it raises."""
    result: list[Any] = []

    def call() -> None:
        with contextlib.suppress(Exception):
            result.append(function())

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0] if result else None
