"""The watchdog: a run that cannot go on ends on every rank with one message of the cause."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed import HashStore

from prcl_fast.errors import InputError, RunError
from prcl_fast.processes.agreement import DifferenceError
from prcl_fast.processes.watchdog import Watchdog
from support.processes import free_port

# The same periods everywhere, short ones.
BEAT_S, GONE_S, STALL_S = 0.1, 1.0, 0.8


class Process:
    """A watchdog that records the statuses with which it would end the process."""

    def __init__(self, rank: int, world: int, store: HashStore | None, stall_s: float | None = None) -> None:
        self.printed: list[str] = []
        self.ended: list[int] = []
        self._over = threading.Event()
        self.recorded: list[str] = []
        self.watchdog = Watchdog(
            rank, world, store, stall_s, self.printed.append, self._end, beat_s=BEAT_S, gone_s=GONE_S
        )
        self.watchdog.record = self.recorded.append

    def _end(self, status: int) -> None:
        self.ended.append(status)
        self._over.set()

    def status(self) -> int | None:
        """The status with which it would have ended; None if it does not within 10 seconds."""
        self._over.wait(10.0)
        return self.ended[0] if self.ended else None


def processes(world: int, stall_s: float | None = None) -> list[Process]:
    store = HashStore()
    return [Process(rank, world, store, stall_s) for rank in range(world)]


def printed(group: list[Process]) -> list[str]:
    return [line for process in group for line in process.printed]


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 10.0
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    assert condition()


def test_a_stall_of_a_single_process_is_reported_and_ends_it() -> None:
    process = Process(0, 1, None, STALL_S)
    process.watchdog.details = lambda: "worker 1 is at a.png"
    with process.watchdog as watchdog:
        watchdog.at("waiting for data at iteration 41")
        assert process.status() == 1
    assert process.printed == [
        "prcl: no progress for 0.8 s, waiting for data at iteration 41 (worker 1 is at a.png); "
        "train.stall_timeout sets how long that may take"
    ]
    assert process.recorded == [process.printed[0].removeprefix("prcl: ")]


def test_details_that_fail_or_hang_do_not_delay_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prcl_fast.processes.watchdog._OUTPUT_S", 0.1)
    for details in (lambda: 1 / 0, lambda: time.sleep(60)):
        process = Process(0, 1, None, STALL_S)
        process.watchdog.details = details  # type: ignore[assignment]
        with process.watchdog as watchdog:
            watchdog.at("evaluating")
            assert process.status() == 1
        assert process.printed[0].startswith("prcl: no progress for 0.8 s, evaluating; ")


def test_neither_progress_nor_the_start_is_a_stall() -> None:
    process = Process(0, 1, None, STALL_S)
    with process.watchdog as watchdog:
        time.sleep(1.5 * STALL_S)
        for i in range(12):
            watchdog.at(f"in the step of iteration {i}")
            time.sleep(STALL_S / 8)
    assert (process.printed, process.ended) == ([], [])


def test_with_one_process_an_error_passes() -> None:
    process = Process(0, 1, None)
    with pytest.raises(RunError, match="no luck"), process.watchdog:
        raise RunError("no luck")
    assert (process.printed, process.ended) == ([], [])


@pytest.mark.parametrize("faulty", [0, 2])
def test_an_error_is_printed_once_and_ends_all_ranks(faulty: int) -> None:
    group = processes(3)
    others = [process for process in group if process is not group[faulty]]
    for process in others:
        process.watchdog.__enter__()
    with pytest.raises(InputError), group[faulty].watchdog:
        raise InputError("data.root: no such folder")
    assert group[faulty].status() == 2
    assert [process.status() for process in others] == [2, 2]
    assert printed(group) == group[faulty].printed == ["prcl: data.root: no such folder"]
    assert [process.recorded for process in group] == [["data.root: no such folder"]] * 3


def test_an_unexpected_error_is_printed_with_its_traceback() -> None:
    group = processes(2)
    with group[0].watchdog:
        with pytest.raises(ZeroDivisionError), group[1].watchdog:
            print(1 / 0)
        assert group[0].status() == 1
    (text,) = printed(group)
    assert text.startswith("Traceback")
    assert text.endswith("ZeroDivisionError: division by zero")


def test_only_the_first_of_several_reports_is_printed() -> None:
    group = processes(3)
    for process in group:
        process.watchdog.__enter__()
    threads = [
        threading.Thread(target=process.watchdog.report, args=[f"from rank {rank}"])
        for rank, process in enumerate(group)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(printed(group)) == 1


def test_the_rank_that_is_furthest_behind_reports_the_stall() -> None:
    group = processes(3, STALL_S)
    for process in group:
        process.watchdog.__enter__()
        process.watchdog.at("waiting for data at iteration 40")
    for process in (group[0], group[2]):
        process.watchdog.at("in the step of iteration 40")
    assert [process.status() for process in group] == [1, 1, 1]
    assert printed(group) == group[1].printed
    assert (
        group[1]
        .printed[0]
        .startswith(
            "prcl: no progress for 0.8 s, rank 1 is waiting for data at iteration 40; train.stall_timeout"
        )
    )


def test_a_rank_that_cannot_report_its_stall_is_named_by_another() -> None:
    group = processes(2, STALL_S)
    group[1].watchdog.stall_s = None
    for process in group:
        process.watchdog.__enter__()
        process.watchdog.at("saving")
    group[0].watchdog.at("in the step of iteration 7")
    assert [process.status() for process in group] == [1, 1]
    assert printed(group) == group[0].printed
    assert "waiting for rank 1, which is saving; " in group[0].printed[0]


def test_a_stall_in_the_same_activity_names_all_ranks() -> None:
    group = processes(2, STALL_S)
    for process in group:
        process.watchdog.__enter__()
        process.watchdog.at("in the step of iteration 7")
    assert [process.status() for process in group] == [1, 1]
    assert len(printed(group)) == 1
    assert "all 2 processes are in the step of iteration 7" in printed(group)[0]


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_silent_rank_is_named(dead: int) -> None:
    group = processes(3)
    for process in group:
        process.watchdog.__enter__()
    wait_until(lambda: all(0 in group[r].watchdog._heartbeat.statuses for r in (1, 2)))
    wait_until(lambda: len(group[0].watchdog._heartbeat.statuses) == 2)
    group[dead].watchdog._stopped.set()
    group[dead].watchdog._heartbeat.stop()
    alive = [process for process in group if process is not group[dead]]
    assert [process.status() for process in alive] == [1, 1]
    assert printed(group) == [f"prcl: rank {dead} is gone (killed, out of memory, or its machine lost)"]


def test_a_difference_of_the_ranks_is_printed_by_each_of_them() -> None:
    group = processes(3)
    group[2].watchdog.__enter__()  # it does not come to raise it
    for process in group[:2]:
        with pytest.raises(DifferenceError), process.watchdog:
            raise DifferenceError("process 1 has seed 1, process 0 has 0")
    assert [process.status() for process in group] == [2, 2, 2]
    assert [process.printed for process in group] == [["prcl: process 1 has seed 1, process 0 has 0"]] * 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("status/1", "no json"),
        ("status/1", '{"beat": 1}'),
        ("report", "[]"),
        ("report", '[1, "text of a stranger", 1, false]'),
        ("report", '[7, "text of a stranger", 1, false]'),
    ],
)
def test_entries_of_another_program_in_the_store_end_the_run_with_one_line(key: str, value: str) -> None:
    store = HashStore()
    process = Process(0, 2, store)
    if key == "report" and value.startswith("[1"):
        process = Process(1, 2, store)
        store.set("status/0", '[0, 0, "starting", false]')
    store.set(key, value)
    with process.watchdog:
        assert process.status() == 1
    assert process.printed == [
        f"prcl: another program wrote {key} in the run's store; MASTER_PORT sets another port"
    ]


def test_a_stall_names_the_silence_of_a_rank_instead_of_an_old_activity() -> None:
    group = processes(2, STALL_S)
    for process in group:
        process.watchdog.__enter__()
    wait_until(lambda: 1 in group[0].watchdog._heartbeat.statuses)
    group[1].watchdog._stopped.set()
    group[1].watchdog._heartbeat.stop()
    group[0].watchdog.at("in the step of iteration 2")
    group[0].watchdog._gone_s = 60.0
    assert group[0].status() == 1
    assert ", waiting for rank 1, which is silent for " in group[0].printed[0]
    assert "starting" not in group[0].printed[0]


def test_the_end_of_the_other_ranks_during_a_pause_is_told_as_such() -> None:
    group = processes(3)
    heartbeat, peers = group[2].watchdog._heartbeat, group[2].watchdog._peers
    assert heartbeat is not None
    assert peers is not None
    heartbeat.heard_at |= {0: 0.0, 1: 0.0}
    assert peers.gone([0, 1]).startswith("rank 0, 1 is gone")
    heartbeat.store_lost = True
    assert peers.lost_store() == "lost rank 0, or the machine that started it"
    peers.paused = (0.0, 21.4)
    assert peers.gone([0, 1]) == "rank 0, 1 ended while rank 2 was stopped for 21 s"
    assert peers.lost_store() == "rank 0 ended while rank 2 was stopped for 21 s"


def test_ranks_may_leave_at_different_times() -> None:
    group = processes(3)
    with group[2].watchdog:
        with group[0].watchdog, group[1].watchdog:
            pass
        time.sleep(2 * GONE_S)
    assert not printed(group)
    assert not any(process.ended for process in group)


def test_the_store_may_end_after_rank_0_has_left() -> None:
    group = processes(2)
    with group[1].watchdog:
        with group[0].watchdog:
            pass
        heartbeat = group[1].watchdog._heartbeat
        wait_until(lambda: 0 in heartbeat.statuses and heartbeat.statuses[0].left)
        heartbeat.store_lost = True
        time.sleep(5 * BEAT_S)
    assert (printed(group), group[1].ended) == ([], [])


def test_an_interrupt_ends_the_other_ranks_silently() -> None:
    group = processes(2)
    with group[0].watchdog:
        with pytest.raises(KeyboardInterrupt), group[1].watchdog:
            raise KeyboardInterrupt
        assert group[0].status() == 1
    assert [line for line in printed(group) if line] == []
    assert not group[1].ended


# Real runs, all at the same time. One process forks the ranks of all runs, because importing PyTorch takes
# longer than the runs.
SCRIPT = """
import os, sys, time
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
import torch
from prcl_fast.processes.launch import Launch
from prcl_fast.processes.rendezvous import join
from prcl_fast.processes.watchdog import Watchdog
from prcl_fast.errors import RunError


def work(launch, what, actor):
    say = lambda text: print(text, file=sys.stderr, flush=True)
    stall_s = 2.0 if what == "hang" else None
    with (
        join(launch, torch.device("cpu"), 3.0 if what == "absent" else 60.0) as group,
        Watchdog(launch.rank, launch.world, group.store, stall_s, say, beat_s=0.2, gone_s=3.0) as watchdog,
    ):
        for iteration in range(1000):
            watchdog.at(f"waiting for data at iteration {iteration}")
            if iteration == 20 and what == "end":
                return
            if iteration == 20 and launch.rank == actor:
                if what == "raise":
                    raise RunError("the loss was not finite")
                if what == "kill":
                    time.sleep(1)
                    os.kill(os.getpid(), 9)
                time.sleep(100)
            watchdog.at(f"in the step of iteration {iteration}")
            torch.distributed.all_reduce(torch.ones(1))


torch.set_num_threads(1)
folder, *runs = sys.argv[1:]
children = {}
for run in runs:
    what, actor, world, port = (int(text) if text.isdigit() else text for text in run.split("-"))
    for rank in range(world):
        child = os.fork()
        if not child:
            errors = os.open(f"{folder}/{what}-{actor}.{rank}", os.O_CREAT | os.O_WRONLY)
            os.dup2(errors, 2)
            try:
                work(Launch(rank, world, rank, world, "127.0.0.1", port, "torchrun"), what, actor)
            except BaseException as error:
                print("escaped:", repr(error), file=sys.stderr)
            sys.stderr.flush()
            os._exit(0)
        children[child] = f"{what}-{actor}.{rank}"
for _ in range(len(children)):
    child, status = os.wait()
    print(children[child], os.waitstatus_to_exitcode(status), flush=True)
"""

RUNS = {
    "end-0": (2, None),
    "raise-0": (2, "prcl: the loss was not finite"),
    "raise-1": (3, "prcl: the loss was not finite"),
    "kill-1": (2, "prcl: rank 1 is gone (killed, out of memory, or its machine lost)"),
    "kill-0": (3, "prcl: lost rank 0, or the machine that started it"),
    "hang-1": (
        2,
        "prcl: no progress for 2 s, rank 1 is waiting for data at iteration 20; "
        "train.stall_timeout sets how long that may take",
    ),
    "absent-0": (
        2,
        "prcl: a collective timed out, waiting for rank 0, which is waiting for data at iteration 20",
    ),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """The exit status of each RUN.RANK by the file of its standard error."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [f"{name}-{world}-{free_port()}" for name, (world, _) in RUNS.items()]
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), *runs],
        capture_output=True,
        text=True,
        timeout=90,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert not process.stderr
    lines = [line.split() for line in process.stdout.splitlines()]
    return {str(folder / name): int(status) for name, status in lines}


@pytest.mark.parametrize("name", RUNS)
def test_each_failure_ends_all_ranks_with_one_line(name: str, outcomes: dict[str, int]) -> None:
    what, actor = name.split("-")
    world, line = RUNS[name]
    statuses: list[int] = []
    lines: list[str] = []
    for rank in range(world):
        (path,) = [path for path in outcomes if path.endswith(f"/{name}.{rank}")]
        statuses.append(outcomes[path])
        lines += Path(path).read_text().splitlines()
    assert lines == ([line] if line else [])
    expected = [0 if what == "end" else 1] * world
    if what == "kill":
        expected[int(actor)] = -signal.SIGKILL
    assert statuses == expected
