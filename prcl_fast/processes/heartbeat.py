"""The heartbeat of a rank: its status and the run's first report, exchanged through a store."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from dataclasses import astuple, dataclass

from torch.distributed import Store


@dataclass(frozen=True)
class Status:
    """The last status of a rank.

    Attributes:
        calls: how many activities it has begun.
        activity: the last of them, in words.
        left: it has left the run and sends no further status.
    """

    calls: int
    activity: str
    left: bool


@dataclass(frozen=True)
class Report:
    """The first report of a run.

    Attributes:
        rank: its author; -1 where another program has written it.
        message: its text.
        status: with which all ranks exit.
        everywhere: every rank prints it.
    """

    rank: int
    message: str
    status: int
    everywhere: bool


class Heartbeat:
    """A thread that writes the status of this rank every `beat_s` seconds and reads that of the other ranks.

    A call to a store whose machine is gone can block for minutes. Only this thread calls the store; the
    attributes are plain memory that other threads may read.

    Attributes:
        statuses: the last status of each rank that has written one. All ranks are read on rank 0 and where
            `read_all` is set, else rank 0 alone.
        clock: gives seconds.
        heard_at: for each rank in `statuses`, the time by `clock` at which a new status was last read.
        answered_at: the time by `clock` at which the store last answered.
        report: the run's first report, None before it.
        readers: the number of ranks that have read the report.
        store_lost: the store does not answer any more.
        foreign: an entry of the store that no rank can have written; None as long as there is none.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        store: Store,
        beat_s: float,
        own_status: Callable[[], tuple[int, str]],
        clock: Callable[[], float],
    ) -> None:
        """
        Args:
            own_status: gives the calls and the activity of this rank.
            clock: gives seconds.
        """
        self.rank, self.world = rank, world
        self.statuses: dict[int, Status] = {}
        self.heard_at: dict[int, float] = {}
        self.answered_at = clock()
        self.report: Report | None = None
        self.readers = 0
        self.foreign: str | None = None
        self.store_lost = False
        self.read_all = rank == 0
        self.clock = clock
        self._store, self._own_status, self._beat_s = store, own_status, beat_s
        self._beats: dict[int, int] = {}  # the number of the beat that each rank's status carried
        self._claims: list[Report] = []  # of the threads of this rank
        self._left = self._has_read_report = self._stopped = False
        self._rounds = self._wanted_rounds = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Connects, which can take seconds where names are slow to resolve, and starts the thread."""
        try:
            # A connection of its own: two threads cannot share one.
            self._own_store: Store = self._store.clone()  # type: ignore[attr-defined]
        except RuntimeError:
            self.store_lost = True
        else:
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread, unless the store blocks it."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def exchange(self, timeout: float) -> bool:
        """Writes and reads now, for at most `timeout` seconds; False where that was not possible."""
        with self._changed:
            # The round in progress may have read before this call.
            wanted = self._wanted_rounds = self._rounds + 2
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.store_lost or self._rounds >= wanted, timeout)
            return self._rounds >= wanted and not self.store_lost

    def claim_report(self, report: Report, timeout: float) -> bool:
        """Whether `report` is the first of the run. True also where the store does not answer."""
        self._claims.append(report)
        return not self.exchange(timeout) or self.report is None or self.report.rank == self.rank

    def leave(self, timeout: float) -> None:
        """Marks this rank as one that has left, so that its silence is no loss."""
        self._left = True
        self.exchange(timeout)

    def _beat(self) -> None:
        try:
            while not self._stopped:
                self._round(self._own_store)
                with self._changed:
                    self._rounds += 1
                    self.answered_at = self.clock()
                    self._changed.notify_all()
                    self._changed.wait_for(
                        lambda: self._stopped or self._rounds < self._wanted_rounds, self._beat_s
                    )
        except RuntimeError:  # all that a broken connection raises
            with self._changed:
                self.store_lost = True
                self._changed.notify_all()

    def _round(self, store: Store) -> None:
        calls, activity = self._own_status()
        store.set(f"status/{self.rank}", json.dumps([self._rounds, calls, activity, self._left]))
        if self._claims and self.report is None:
            store.compare_set("report", "", json.dumps(astuple(self._claims[0])))
        # Getting a key that does not exist would block.
        if self.report is None and store.check(["report"]):
            self.report = self._read_report(store.get("report"))
        if self.report is not None:
            self.readers = store.add("readers", 0 if self._has_read_report else 1)
            self._has_read_report = True
        others = [rank for rank in (range(self.world) if self.read_all else (0,)) if rank != self.rank]
        present = [rank for rank in others if rank in self.statuses or store.check([f"status/{rank}"])]
        texts = store.multi_get([f"status/{rank}" for rank in present])
        for rank, text in zip(present, texts, strict=True):
            try:
                beat, calls, activity, left = json.loads(text)
                status = Status(int(calls), str(activity), bool(left))
            except (ValueError, TypeError):
                self.foreign = f"status/{rank}"
                continue
            if self._beats.get(rank) != beat:
                self._beats[rank], self.heard_at[rank] = beat, self.clock()
            self.statuses[rank] = status

    def _read_report(self, text: bytes) -> Report:
        """The report in the store, or one about it where no rank can have written it."""
        with contextlib.suppress(ValueError, TypeError):
            report = Report(*json.loads(text))
            known = report.rank in range(self.world) and type(report.status) is int
            if known and (report.rank != self.rank or report in self._claims):
                return report
        self.foreign = "report"
        return Report(-1, "", 1, False)
