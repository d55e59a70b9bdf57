"""The session of a command: its process group, watchdog and output, for one process or many."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from prcl_fast.console.plain import PlainConsole
from prcl_fast.processes.collectives import rank
from prcl_fast.processes.launch import device_of, read_launch
from prcl_fast.processes.rendezvous import join
from prcl_fast.processes.watchdog import Watchdog

Loaded = TypeVar("Loaded")
_DAY_S = 86400.0
# A collective times out after the watchdog, whose message names the cause.
_MARGIN_S = 120.0


@dataclass(frozen=True)
class Session(Generic[Loaded]):
    """The resources of a command on this process."""

    loaded: Loaded
    device: torch.device
    watchdog: Watchdog
    console: PlainConsole  # standard error; quiet except on rank 0

    def result(self, line: str) -> None:
        """Prints a line on standard output, on rank 0 only."""
        if rank() == 0:
            print(line)


@contextlib.contextmanager
def session(
    command: str,
    load: Callable[[], Loaded],
    device: Callable[[Loaded], str],
    stall_timeout: Callable[[Loaded], float | None] = lambda _: None,
    captures: Callable[[Loaded], bool] = lambda _: False,
) -> Iterator[Session[Loaded]]:
    """Joins the process group of the run, if it has several processes, and watches it until the block ends.

    An error in the block, or in `load`, is printed by one rank and ends all of them.

    Args:
        command: its name, which must be equal on all ranks.
        load: reads what the command needs.
        device: gives the name of the device, from what was loaded.
        stall_timeout: gives the seconds without progress that end the run, from what was loaded.
        captures: whether CUDA graphs are captured, from what was loaded.

    Raises:
        DifferenceError: the ranks have another command or version of the program or its libraries.
        InputError: a wrong environment or device, or an error of `load`.
        RunError: not all ranks arrived.
    """
    launch = read_launch(os.environ)
    try:
        loaded = load()
        here, stall = device_of(launch, device(loaded)), stall_timeout(loaded)
    except Exception as error:
        if launch is not None:
            join(launch, error, _MARGIN_S, command=command)  # raises it once all ranks have arrived
        raise
    own, world = (0, 1) if launch is None else (launch.rank, launch.world)
    with contextlib.ExitStack() as stack:
        store = None
        if launch is not None:
            if here.type == "cuda":
                torch.cuda.set_device(here)
            timeout_s = (stall or _DAY_S) + _MARGIN_S
            group = join(launch, here, timeout_s, command=command, captures=captures(loaded))
            store = stack.enter_context(group).store
        watchdog = stack.enter_context(Watchdog(own, world, store, stall))
        yield Session(loaded, here, watchdog, PlainConsole(stderr=True, quiet=own > 0))
