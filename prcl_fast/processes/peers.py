"""The other ranks of a run as one rank sees them, by its heartbeat: present, behind, silent or lost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from prcl_fast.processes.failures import first_line
from prcl_fast.processes.heartbeat import Heartbeat


class Peers:
    """Questions about the other ranks, and the answers in words.

    Attributes:
        paused: when this process was last stopped and went on, by the heartbeat's clock, and the seconds that
            it was stopped.
    """

    def __init__(self, heartbeat: Heartbeat, beat_s: float, calls: Callable[[], int]) -> None:
        """
        Args:
            beat_s: seconds between two statuses.
            calls: gives the number of activities that this rank has begun.
        """
        self.paused = (-math.inf, 0.0)
        self._heartbeat, self._beat_s, self._calls = heartbeat, beat_s, calls

    def calls(self) -> dict[int, int]:
        """The calls of each rank that has not left."""
        others = list(self._heartbeat.statuses.items())
        return {self._heartbeat.rank: self._calls()} | {
            rank: status.calls for rank, status in others if not status.left
        }

    def furthest_behind(self) -> tuple[int, bool]:
        """The rank with the fewest calls, the lowest of several; and whether all ranks have equally many."""
        calls = self.calls()
        return min(sorted(calls), key=calls.__getitem__), len(set(calls.values())) == 1

    def silent(self, seconds: float) -> list[int]:
        """The ranks that have sent no status for more than `seconds`."""
        return [rank for rank in self.calls() if self._silence(rank) > seconds]

    def store_answers(self, seconds: float) -> bool:
        """Whether the store has answered within the last `seconds`."""
        return not self._heartbeat.store_lost and self._store_silence() <= seconds

    def doing(self, rank: int) -> str:
        """The activity of another rank, or its silence: an old status says nothing of what it does now."""
        silence = self._silence(rank)
        if silence > 3 * self._beat_s:
            return f"silent for {silence:.0f} s (stopped, or its machine lost)"
        return self._heartbeat.statuses[rank].activity

    def gone(self, ranks: list[int]) -> str:
        """The message about ranks that are silent."""
        names = ", ".join(str(rank) for rank in sorted(ranks))
        paused_at, paused_s = self.paused
        if max(self._heartbeat.heard_at[rank] for rank in ranks) <= paused_at + 2 * self._beat_s:
            return f"rank {names} ended while rank {self._heartbeat.rank} was stopped for {paused_s:.0f} s"
        return f"rank {names} is gone (killed, out of memory, or its machine lost)"

    def cause(self, error: BaseException, activity: str) -> str | None:
        """The cause of an error of a collective in one line, or None where another rank prints it.

        Args:
            activity: of this rank.
        """
        heartbeat, beat_s = self._heartbeat, self._beat_s
        heartbeat.read_all = True
        until = time.monotonic() + 2.5 * beat_s
        while time.monotonic() < until and not heartbeat.store_lost and heartbeat.report is None:
            heartbeat.exchange(beat_s)
            time.sleep(beat_s / 10)
        if heartbeat.report is not None:
            return None
        if not self.store_answers(2 * beat_s):
            time.sleep(beat_s / 2)  # until the watching thread has noticed a pause of this process
            return self.lost_store()
        silent = self.silent(2 * beat_s)
        if silent:
            return self.gone(silent)
        last, alike = self.furthest_behind()
        if last != heartbeat.rank and not alike:
            return f"a collective timed out, waiting for rank {last}, which is {self.doing(last)}"
        return f"rank {heartbeat.rank}: a collective failed while {activity}: {first_line(error)}"

    def lost_store(self) -> str | None:
        """The message about a store that does not answer; None where another rank prints it.

        Without a store the ranks cannot agree on who reports. The last rank is the least likely to be on the
        machine of rank 0.
        """
        heartbeat = self._heartbeat
        if heartbeat.rank != heartbeat.world - 1:
            return None
        paused_at, paused_s = self.paused
        if heartbeat.clock() - paused_at <= 4 * self._beat_s:
            return f"rank 0 ended while rank {heartbeat.rank} was stopped for {paused_s:.0f} s"
        if heartbeat.store_lost:
            return "lost rank 0, or the machine that started it"
        return f"rank 0 has not answered for {self._store_silence():.0f} s (stopped, or its machine lost)"

    def _silence(self, rank: int) -> float:
        now = self._heartbeat.clock()
        return now - self._heartbeat.heard_at.get(rank, now)

    def _store_silence(self) -> float:
        return self._heartbeat.clock() - self._heartbeat.answered_at
