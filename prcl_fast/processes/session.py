"""A command on one process, or on all that torchrun or srun started: their group, watch and output."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from rich.console import Console

from prcl_fast.errors import InputError
from prcl_fast.processes.collectives import rank
from prcl_fast.processes.launch import device_of, read_launch
from prcl_fast.processes.rendezvous import join
from prcl_fast.processes.watchdog import Watchdog

Loaded = TypeVar("Loaded")
_A_DAY = 86400.0
# A collective gives up after the watchdog, which knows more, has spoken.
_MARGIN = 120.0


@dataclass(frozen=True)
class Session(Generic[Loaded]):
    """What a command works with on this process."""

    loaded: Loaded
    device: torch.device
    watchdog: Watchdog
    console: Console  # standard error; quiet but on process 0

    def result(self, line: str) -> None:
        """Prints a line on standard output, once for all processes."""
        if rank() == 0:
            print(line)


@contextlib.contextmanager
def session(
    load: Callable[[], Loaded],
    device: Callable[[Loaded], str],
    stall_timeout: Callable[[Loaded], float | None] = lambda _: None,
    captures: Callable[[Loaded], bool] = lambda _: False,
) -> Iterator[Session[Loaded]]:
    """Joins the processes of the run, if there are several, and watches over them until the block ends.

    An error in the block, and a mistake in what `load` reads, is said by one process and ends all of them.

    Args:
        load: reads what the command needs.
        device, stall_timeout, captures: the name of the device, the seconds without progress, and whether
            CUDA graphs are captured, that it asks for.

    Raises:
        InputError: a wrong environment, device, or whatever `load` says.
        RunError: the processes did not come together.
    """
    launch = read_launch(os.environ)
    try:
        loaded = load()
        here, stall = device_of(launch, device(loaded)), stall_timeout(loaded)
    except InputError as mistake:
        if launch is not None:
            join(launch, mistake, _MARGIN)  # raises it once all have come
        raise
    own, world = (0, 1) if launch is None else (launch.rank, launch.world)
    with contextlib.ExitStack() as stack:
        store = None
        if launch is not None:
            if here.type == "cuda":
                torch.cuda.set_device(here)
            group = join(launch, here, (stall or _A_DAY) + _MARGIN, captures=captures(loaded))
            store = stack.enter_context(group).store
        watchdog = stack.enter_context(Watchdog(own, world, store, stall, _say))
        yield Session(loaded, here, watchdog, Console(stderr=True, quiet=own > 0))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
