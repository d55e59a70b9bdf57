"""Data workers in trouble: no room, no descriptor, a stopped or killed process. One line, and no hang."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prcl_fast.data import workers as workers_module
from prcl_fast.data.workers import WorkerDiedError, decoded_micro_steps
from prcl_fast.errors import RunError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@dataclass(frozen=True)
class Numbered:
    number: Tensor


class Numbers:
    """Micro-step k holds the number k; `before` is called in the worker first."""

    def __init__(self, before: Callable[[int], object] = lambda micro_step: None) -> None:
        self.before = before

    def __getitem__(self, micro_step: int) -> Numbered:
        self.before(micro_step)
        return Numbered(torch.tensor([micro_step]))

    def names(self, micro_step: int) -> list[str]:
        return [f"image_{micro_step}"]


def numbers(count: int, steps: Numbers, workers: int, device: torch.device = CPU) -> list[int]:
    stream = decoded_micro_steps(steps, 3, workers, device)
    with contextlib.closing(stream):
        return [int(item.number) for item in islice(stream, count)]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_micro_steps_come_in_order(workers: int) -> None:
    assert numbers(8, Numbers(), workers) == list(range(3, 11))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("call", "error", "why"),
    [
        ("memfd_create", OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "Too many open files"),
        ("pwrite", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        ("ftruncate", MemoryError(), "not enough memory"),
        ("ftruncate", OSError("no reason with a number"), "no reason with a number"),
    ],
)
def test_a_worker_without_room_is_one_line_that_names_the_remedies(
    monkeypatch: pytest.MonkeyPatch, call: str, error: Exception, why: str
) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(RunError) as caught:
        numbers(2, Numbers(), 2)
    assert str(caught.value) == (
        f"data.workers: a worker cannot hand over micro-step 3 (images image_3): {why}; lower data.workers "
        "(0 decodes in the main process) or the batch"
    )
    assert multiprocessing.active_children() == []


def test_a_worker_that_cannot_be_started_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = multiprocessing.Process.start, []

    def fail(process: multiprocessing.Process) -> None:
        if started:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        started.append(process)
        start(process)

    monkeypatch.setattr(multiprocessing.Process, "start", fail)
    line = r"data\.workers: worker 2 of 3 cannot be started: Resource temporarily unavailable; lower data\."
    with pytest.raises(RunError, match=line):
        numbers(2, Numbers(), 3)
    assert multiprocessing.active_children() == []
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_a_signal_within_the_start_of_a_worker_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    start = multiprocessing.Process.start

    def interrupted(process: multiprocessing.Process) -> None:
        start(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(multiprocessing.Process, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        numbers(2, Numbers(), 2)
    left = multiprocessing.active_children()
    for process in left:
        process.kill()
    assert left == []


def test_an_error_of_the_code_comes_with_its_traceback() -> None:
    def fail(micro_step: int) -> None:
        raise ZeroDivisionError("in the worker")

    with pytest.raises(RuntimeError, match=r"(?s)in a data worker:\nTraceback.*ZeroDivisionError: in the"):
        numbers(1, Numbers(fail), 1)


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_killed_worker_is_always_the_same_line(device: torch.device, no_gpu: None) -> None:
    for _ in range(5):
        stream = decoded_micro_steps(Numbers(), 0, 2, device)
        with contextlib.closing(stream):
            next(stream)
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            with pytest.raises(WorkerDiedError, match=r"was killed by signal 9 \(SIGKILL\) at micro-step \d"):
                list(islice(stream, 20))
    assert multiprocessing.active_children() == []


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Page-locked copies become plain ones."""
    monkeypatch.setattr(workers_module, "pinned", lambda item: item)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


@pytest.mark.parametrize("workers", [0, 2])
def test_the_thread_of_page_locked_copies_keeps_the_order(no_gpu: None, workers: int) -> None:
    assert numbers(8, Numbers(), workers, CUDA) == list(range(3, 11))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_stopped_worker_does_not_keep_the_stream_from_closing(no_gpu: None, device: torch.device) -> None:
    stream = decoded_micro_steps(Numbers(), 0, 2, device)
    next(stream)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGSTOP)
    stream.close()
    assert multiprocessing.active_children() == []


def test_workers_need_no_socket_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 120)  # a socket's path has at most 107 bytes
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert numbers(4, Numbers(), 2) == [3, 4, 5, 6]
    assert list(long.iterdir()) == []


SCRIPT = """
    import multiprocessing, torch
    from prcl_fast.config import parse_config
    from prcl_fast.data.batches import training_batches
    from prcl_fast.data.sources import build_source
    tree = {"output": "unused", "data": {"kind": "synthetic", "workers": 2}, "method": {"name": "supervised"}}
    config = parse_config(tree, "test")
    stream = training_batches(build_source(config.data), config, start=0, device=torch.device("cpu"))
    for _ in range(4):
        next(stream)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
"""


@pytest.mark.parametrize("options", ["size=4k", "ro"])
def test_workers_need_no_room_in_dev_shm(options: str) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("no user namespaces here")
    inside = f'mount -t tmpfs -o {options} tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", inside, "sh", sys.executable, "-c", textwrap.dedent(SCRIPT)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (0, "")


# The main process is killed between steps, or while its workers are still at their beginning.
BETWEEN = "import time\ntime.sleep(600)\n"
BEGINNING = """
import os, time, torch
from prcl_fast.data import workers
main, set_threads, start = os.getpid(), torch.set_num_threads, workers._start
def slow(number):
    while os.getppid() == main:
        time.sleep(0.01)
    set_threads(number)
def started(steps, found):
    start(steps, found)
    if len(found) == 2:
        print(*(worker.process.pid for worker in found), flush=True)
        time.sleep(600)
torch.set_num_threads, workers._start = slow, started
"""


@pytest.mark.parametrize(
    "script",
    [textwrap.dedent(SCRIPT) + BETWEEN, BEGINNING + textwrap.dedent(SCRIPT)],
    ids=["between", "beginning"],
)
def test_workers_end_when_the_main_process_is_killed(script: str) -> None:
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        pids = [int(word) for word in process.stdout.readline().split()]
        process.kill()
    assert len(pids) == 2
    deadline = time.monotonic() + 60
    while left := [pid for pid in pids if running(pid)]:
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError("a worker outlives the main process")
        time.sleep(0.1)


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # in a container, nobody may wait for an orphan
