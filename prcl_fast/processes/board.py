"""What the processes of a run tell each other while they work, through a store."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass

from torch.distributed import Store


@dataclass(frozen=True)
class Note:
    """What one process last said: how often it has begun something, what, and whether it has left."""

    calls: int
    what: str
    left: bool


class Board:
    """A thread that writes this process's note every `beat_s` seconds and reads those of the others.

    Talking to a store whose machine is gone can block for minutes, so that only this thread does it;
    everything that others read here is plain memory.

    Attributes:
        notes: the last note of each rank that has written one: of all of them on rank 0 and where `read_all`
            is set, else of rank 0.
        heard: for each rank in `notes`, when its note was last found written anew, by `clock`.
        talked: when the store last answered, by `clock`.
        first: (rank, message) of the first report of the run, None before it.
        seen: the number of processes that have read it.
        lost: the store does not answer.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        store: Store,
        beat_s: float,
        mine: Callable[[], tuple[int, str]],
        clock: Callable[[], float],
    ) -> None:
        """`mine` gives the calls and the text of this process's note, `clock` seconds."""
        self.rank, self.world = rank, world
        self.notes: dict[int, Note] = {}
        self.heard: dict[int, float] = {}
        self.talked = clock()
        self.first: tuple[int, str] | None = None
        self.seen = 0
        self.lost = False
        self.read_all = rank == 0
        self._store, self._mine, self._clock, self._beat_s = store, mine, clock, beat_s
        self._beats: dict[int, int] = {}
        self._claim: str | None = None
        self._left = self._told = self._stopped = False
        self._rounds = self._wanted = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._talk, name="board", daemon=True)

    def start(self) -> None:
        """Connects, which can take seconds where names are slow to resolve, and starts the thread."""
        try:
            # A connection of its own: two threads cannot share one.
            self._own_store: Store = self._store.clone()  # type: ignore[attr-defined]
        except RuntimeError:
            self.lost = True
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
        """Writes and reads now, for at most `timeout` seconds; whether that was done."""
        with self._changed:
            self._wanted = self._rounds + 2  # the one under way may have read before this call
            self._changed.notify_all()
            wanted = self._wanted
            return (
                self._changed.wait_for(lambda: self.lost or self._rounds >= wanted, timeout) and not self.lost
            )

    def claim(self, message: str, timeout: float) -> bool:
        """Whether `message` is the first report of the run. True also where the store cannot tell."""
        self._claim = message
        return not self.exchange(timeout) or self.first is None or self.first[0] == self.rank

    def leave(self, timeout: float) -> None:
        """Tells the others that this process will not be heard of again, and means it."""
        self._left = True
        self.exchange(timeout)

    def _talk(self) -> None:
        try:
            while not self._stopped:
                self._round(self._own_store)
                with self._changed:
                    self._rounds += 1
                    self.talked = self._clock()
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._stopped or self._rounds < self._wanted, self._beat_s)
        except RuntimeError:  # whatever the connection says when it is broken
            with self._changed:
                self.lost = True
                self._changed.notify_all()

    def _round(self, store: Store) -> None:
        calls, what = self._mine()
        store.set(f"note/{self.rank}", json.dumps([self._rounds, calls, what, self._left]))
        if self._claim is not None and self.first is None:
            store.compare_set("first", "", json.dumps([self.rank, self._claim]))
        # A get of what is not there would block.
        if self.first is None and store.check(["first"]):
            rank, message = json.loads(store.get("first"))
            self.first = rank, message
        if self.first is not None:
            self.seen = store.add("seen", 0 if self._told else 1)
            self._told = True
        others = [rank for rank in (range(self.world) if self.read_all else (0,)) if rank != self.rank]
        there = [rank for rank in others if rank in self.notes or store.check([f"note/{rank}"])]
        for rank, text in zip(there, store.multi_get([f"note/{rank}" for rank in there]), strict=True):
            beat, calls, what, left = json.loads(text)
            if self._beats.get(rank) != beat:
                self._beats[rank], self.heard[rank] = beat, self._clock()
            self.notes[rank] = Note(calls, what, left)
