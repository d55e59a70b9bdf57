"""Failures of a rank in words: errors of collectives, and the report of any other error."""

from __future__ import annotations

import traceback

import torch.distributed as dist

from prcl_fast.console.text import printable
from prcl_fast.errors import InputError, RunError, fault_of_system
from prcl_fast.machine.memory import out_of_memory
from prcl_fast.processes.agreement import DifferenceError
from prcl_fast.processes.heartbeat import Report


def first_line(error: BaseException) -> str:
    """The message of an error without the C++ stack that PyTorch adds."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_collective_failure(error: Exception) -> bool:
    """Whether a collective has raised the error."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def report_of(error: Exception, rank: int) -> Report:
    """The report about an error of this rank that is not a collective's.

    One line for a mistake of the user, a run that cannot go on, and a fault of the machine, else a traceback.
    """
    if isinstance(error, (InputError, RunError)):
        text = printable(f"prcl: {error}")
    elif (fault := out_of_memory(error) or fault_of_system(error)) is not None:
        text = printable(f"prcl: rank {rank}: {fault}")
    else:
        text = "".join(traceback.format_exception(error)).rstrip()
    status = 2 if isinstance(error, InputError) else 1
    return Report(rank, text, status, everywhere=isinstance(error, DifferenceError))
