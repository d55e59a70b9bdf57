"""Worker processes: decode micro-steps ahead, and report a worker that died."""

from __future__ import annotations

import itertools
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from types import TracebackType

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from prcl_fast.data.micro_steps import DecodedBatch, DecodingFailure, MicroSteps, named_images
from prcl_fast.errors import InputError, RunError
from prcl_fast.step_parts import part


class WorkerDiedError(RunError):
    """A worker process ended too early: killed, or out of memory. The message is one line."""


def decoded_micro_steps(
    steps: MicroSteps, start: int, workers: int, *, pin: bool
) -> Generator[DecodedBatch, None, None]:
    """Micro-steps number start, start + 1, ... without end; `close()` ends the worker processes.

    Args:
        workers: processes that decode; 0 decodes in this process, when an item is asked for.
        pin: in page-locked memory, for asynchronous copies to a CUDA device.

    Raises:
        InputError: an image that cannot be read.
        WorkerDiedError: naming the images that the worker was decoding.
    """
    watched = _Watched(steps, workers)
    loader = DataLoader(
        watched,
        batch_size=None,
        sampler=_CountFrom(start),
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_start_worker if workers else None,
    )
    with _SigchldHandlerKept():
        iterator = iter(loader)
    try:
        while True:
            try:
                with part("data wait"):
                    decoded = next(iterator)
            # EOFError: the worker died while it sent an item.
            except (RuntimeError, OSError, EOFError) as error:
                died = watched.death(getattr(iterator, "_workers", []))
                if died is None:
                    raise
                raise WorkerDiedError(died) from error
            if isinstance(decoded, DecodingFailure):
                raise InputError(decoded.message)
            yield decoded
    finally:
        if workers:
            # Explicitly: the traceback of an error may keep the iterator alive.
            iterator._shutdown_workers()  # type: ignore[attr-defined]


class _Watched(Dataset[DecodedBatch | DecodingFailure]):
    """Micro-steps; shared memory holds the number of the one that each worker is decoding."""

    def __init__(self, steps: MicroSteps, workers: int) -> None:
        self.steps = steps
        self.at = torch.full((workers,), -1).share_memory_()

    def __getitem__(self, micro_step: int) -> DecodedBatch | DecodingFailure:
        worker = get_worker_info()
        if worker is not None:
            self.at[worker.id] = micro_step
        return self.steps[micro_step]

    def death(self, workers: list[torch.multiprocessing.Process]) -> str | None:
        """One line about the first worker that has ended, or None."""
        for worker, micro_step in zip(workers, self.at.tolist(), strict=False):
            code = worker.exitcode
            if not code:  # None while it runs; 0 after a normal end
                continue
            how = f"ended with exit status {code}"
            if code < 0:
                how = f"was killed by signal {-code} ({signal.Signals(-code).name})"
            where = "before its first micro-step"
            if micro_step >= 0:
                where = f"at micro-step {micro_step} ({named_images(self.steps.names(micro_step))})"
            return f"data.workers: a worker {how} {where}; if memory ran out, lower data.workers"
        return None


class _SigchldHandlerKept:
    """Undoes the loader's SIGCHLD handler.

    That handler raises at an arbitrary place of the main process when a worker dies, mostly inside a training
    step. Without it, the loader finds the death when the worker's next micro-step is due.
    """

    def __enter__(self) -> None:
        self.former = signal.getsignal(signal.SIGCHLD)

    def __exit__(self, *_: object) -> None:
        if self.former is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, self.former)


class _CountFrom(Sampler[int]):
    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


def _start_worker(_: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach every process of a job. Only the main process reacts: it may have
    # to save its state, and needs its workers until then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = _print_unless_disconnected
    torch.set_num_threads(1)


def _print_unless_disconnected(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    # The thread that sends tensors fails here when Ctrl-C ended the main process before it received them.
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)
