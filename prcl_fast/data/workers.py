"""Worker processes that make micro-steps, and what becomes of them when they fail."""

from __future__ import annotations

import itertools
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from types import TracebackType

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from prcl_fast.data.micro_steps import Loaded, MicroSteps, Mistake
from prcl_fast.errors import InputError, RunError
from prcl_fast.step_parts import part

_NAMES_SHOWN = 16


class WorkerDiedError(RunError):
    """A worker process ended before its work did: killed, or out of memory. The message is one line."""


def loaded_micro_steps(
    steps: MicroSteps, start: int, workers: int, *, pin: bool
) -> Generator[Loaded, None, None]:
    """Micro-steps number start, start + 1, ... without end; `close()` ends the worker processes.

    Args:
        workers: processes that make them; 0 makes them here, when they are asked for.
        pin: in page-locked memory, for asynchronous copies to a CUDA device.

    Raises:
        InputError: an image that cannot be read.
        WorkerDiedError: naming the images of the micro-step that the worker was at.
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
    with _HandlerOfChildrenKept():
        iterator = iter(loader)
    try:
        while True:
            try:
                with part("data wait"):
                    loaded = next(iterator)
            except (RuntimeError, OSError, EOFError) as error:  # the latter: from a hand-over cut short
                died = watched.death(getattr(iterator, "_workers", []))
                if died is None:
                    raise
                raise WorkerDiedError(died) from error
            if isinstance(loaded, Mistake):
                raise InputError(loaded.message)
            yield loaded
    finally:
        if workers:
            # Not left to the iterator's end: the traceback of an error may keep it alive.
            iterator._shutdown_workers()  # type: ignore[attr-defined]


class _Watched(Dataset[Loaded | Mistake]):
    """Micro-steps that leave word in shared memory of which one each worker is at."""

    def __init__(self, steps: MicroSteps, workers: int) -> None:
        self.steps = steps
        self.at = torch.full((workers,), -1).share_memory_()

    def __getitem__(self, micro_step: int) -> Loaded | Mistake:
        worker = get_worker_info()
        if worker is not None:
            self.at[worker.id] = micro_step
        return self.steps[micro_step]

    def death(self, workers: list[torch.multiprocessing.Process]) -> str | None:
        """One line about the first worker that has ended, or None."""
        for worker, micro_step in zip(workers, self.at.tolist(), strict=False):
            code = worker.exitcode
            if not code:  # None while it runs; 0 after an end in order
                continue
            how = f"ended with exit status {code}"
            if code < 0:
                how = f"was killed by signal {-code} ({signal.Signals(-code).name})"
            where = "before its first micro-step"
            if micro_step >= 0:
                names = self.steps.names(micro_step)
                more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
                where = f"at micro-step {micro_step} (images {', '.join(names[:_NAMES_SHOWN])}{more})"
            return f"data.workers: a worker {how} {where}; if memory ran out, lower data.workers"
        return None


class _HandlerOfChildrenKept:
    """Undoes the loader's SIGCHLD handler.

    That one raises wherever the main process happens to be when a worker dies, mostly inside a training step.
    Without it, the loader finds the death when the worker's next micro-step is due.
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
    # Ctrl-C and a scheduler's SIGTERM reach every process of a job. The main process alone reacts: it may
    # have to save its state, and must not lose its workers meanwhile.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = _print_unless_disconnected
    torch.set_num_threads(1)


def _print_unless_disconnected(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    # The thread that hands tensors over reports here when Ctrl-C stopped the main process from taking one.
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)
