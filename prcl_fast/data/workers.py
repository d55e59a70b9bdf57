"""Worker processes: decode micro-steps ahead, and report a worker that died."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from prcl_fast.data.handover import memory_file, pack, pinned, receive, send
from prcl_fast.data.micro_steps import DecodedBatch, MicroSteps, named_images
from prcl_fast.errors import InputError, RunError
from prcl_fast.step_parts import part

_AHEAD = 2  # micro-steps that each worker decodes before they are asked for
_DEATH_S = 10.0  # for the system to end a worker whose connection is closed
_REMEDY = "if memory ran out, lower data.workers"
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class WorkerDiedError(RunError):
    """A worker process ended too early: killed, or out of memory. The message is one line."""


def decoded_micro_steps(
    steps: MicroSteps, start: int, workers: int, device: torch.device
) -> Generator[DecodedBatch, None, None]:
    """Micro-steps number start, start + 1, ... without end; `close()` ends the worker processes.

    Args:
        workers: processes that decode; 0 decodes in this process, when an item is asked for.
        device: where the items will be copied; for CUDA they are in page-locked memory.

    Raises:
        InputError: an image that cannot be read.
        WorkerDiedError: naming the images that the worker was decoding.
        RunError: the machine has no room for a worker or its images.
    """
    with contextlib.ExitStack() as stack:
        items: Iterator[DecodedBatch]
        if workers:
            started = stack.enter_context(_started(steps, workers))
            items = _answers(started, steps, start)
            if device.type == "cuda":
                items = stack.enter_context(_pinned_by_thread(items, device, started))
        else:
            items = map(steps.__getitem__, itertools.count(start))
            if device.type == "cuda":
                items = map(pinned, items)
        while True:
            with part("data wait"):
                item = next(items)
            yield item


def _answers(workers: Sequence[_Worker], steps: MicroSteps, start: int) -> Iterator[DecodedBatch]:
    """Micro-steps number start, start + 1, ...; the workers take them in turn."""
    for micro_step in range(start, start + _AHEAD * len(workers)):
        workers[(micro_step - start) % len(workers)].ask(micro_step)
    for micro_step in itertools.count(start):
        worker = workers[(micro_step - start) % len(workers)]
        item = worker.answer(steps, micro_step)
        worker.ask(micro_step + _AHEAD * len(workers))
        yield item


@dataclass(frozen=True)
class _Failure:
    """A worker's answer in place of a micro-step."""

    kind: type[Exception]
    message: str


@dataclass(frozen=True)
class _Worker:
    """A worker process, seen from the main process."""

    process: BaseProcess
    connection: Connection

    def ask(self, micro_step: int) -> None:
        with contextlib.suppress(OSError):  # a dead worker is reported with its next answer
            self.connection.send(micro_step)

    def answer(self, steps: MicroSteps, micro_step: int) -> DecodedBatch:
        """The answer to the oldest question, which was for `micro_step`."""
        try:
            answer = receive(self.connection)
        except (EOFError, ConnectionError):
            raise WorkerDiedError(self._death(steps, micro_step)) from None
        if isinstance(answer, _Failure):
            raise answer.kind(answer.message)
        decoded: DecodedBatch = answer
        return decoded

    def _death(self, steps: MicroSteps, micro_step: int) -> str:
        self.process.join(_DEATH_S)
        code = self.process.exitcode
        how = "closed its connection" if code is None else f"ended with exit status {code}"
        if code is not None and code < 0:
            how = f"was killed by signal {-code} ({signal.Signals(-code).name})"
        images = named_images(steps.names(micro_step))
        return f"data.workers: a worker {how} at micro-step {micro_step} ({images}); {_REMEDY}"


@contextlib.contextmanager
def _started(steps: MicroSteps, number: int) -> Iterator[list[_Worker]]:
    """Worker processes that live until the block ends."""
    workers: list[_Worker] = []
    try:
        for position in range(1, number + 1):
            try:
                _start(steps, workers)
            except OSError as error:
                raise RunError(
                    f"data.workers: worker {position} of {number} cannot be started: "
                    f"{error.strerror or error}; lower data.workers (0 decodes in the main process)"
                ) from None
        yield workers
    finally:
        # They hold nothing that must be saved; an image may take long to decode.
        begun = [worker.process for worker in workers if worker.process.pid is not None]
        for process in begun:
            process.kill()
        for process in begun:
            process.join()
        for worker in workers:
            worker.connection.close()


def _start(steps: MicroSteps, workers: list[_Worker]) -> None:
    here, there = multiprocessing.Pipe()
    with there:
        process = multiprocessing.Process(target=_work, args=(there, steps), daemon=True)
        # Listed before its start: a signal may end this function in between, and the exit of the main process
        # would wait for a worker that nobody ends.
        workers.append(_Worker(process, here))
        # The worker inherits the mask: a signal to the whole job does not reach it before it ignores them.
        former = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _work(connection: Connection, steps: MicroSteps) -> None:
    """The life of a worker: answers questions until the main process is gone."""
    # Ctrl-C and a scheduler's SIGTERM reach every process of a job. Only the main process reacts: it may have
    # to save its state, and needs its workers until then.
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    # The connection alone would not tell: this process holds a copy of its other end.
    main = multiprocessing.parent_process()
    assert main is not None
    with contextlib.suppress(EOFError, ConnectionError):
        while main.sentinel not in wait([connection, main.sentinel]):
            _answer(connection, steps, connection.recv())


def _answer(connection: Connection, steps: MicroSteps, micro_step: int) -> None:
    try:
        packed = pack(steps[micro_step])
        file = memory_file(packed)
    except Exception as error:
        connection.send(_failure(error, f"{micro_step} ({named_images(steps.names(micro_step))})"))
        return
    try:
        send(connection, packed, file)
    finally:
        os.close(file)


def _failure(error: Exception, where: str) -> _Failure:
    if isinstance(error, InputError):
        return _Failure(InputError, str(error))
    if isinstance(error, (OSError, MemoryError)):
        why = (error.strerror or str(error)) if isinstance(error, OSError) else "not enough memory"
        return _Failure(
            RunError,
            f"data.workers: a worker cannot hand over micro-step {where}: {why}; lower data.workers "
            "(0 decodes in the main process) or the batch",
        )
    return _Failure(RuntimeError, f"in a data worker:\n{''.join(traceback.format_exception(error))}")


@contextlib.contextmanager
def _pinned_by_thread(
    items: Iterator[DecodedBatch], device: torch.device, workers: Sequence[_Worker]
) -> Iterator[Iterator[DecodedBatch]]:
    """The items in page-locked memory, copied by a thread that is one item ahead of the consumer."""
    ready: queue.Queue[DecodedBatch | BaseException] = queue.Queue(maxsize=1)
    closing = threading.Event()

    def copy() -> None:
        torch.set_num_threads(1)
        try:
            with torch.cuda.device(device):
                while not closing.is_set():
                    ready.put(pinned(next(items)))
        except BaseException as error:
            ready.put(error)

    def copied() -> Iterator[DecodedBatch]:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=copy, name="page-locked copies", daemon=True)
    thread.start()
    try:
        yield copied()
    finally:
        closing.set()
        for worker in workers:  # the thread may wait for one of them
            worker.process.kill()
        while thread.is_alive():  # it may wait for room in the queue
            with contextlib.suppress(queue.Empty):
                ready.get(timeout=0.01)
