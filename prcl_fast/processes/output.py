"""The lock of an output folder for all ranks: rank 0 takes it, and no rank goes on without it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from prcl_fast.errors import InputError
from prcl_fast.files.locking import locked_folder
from prcl_fast.processes.collectives import broadcast_text, rank


@contextlib.contextmanager
def locked_output(folder: Path, key: str) -> Iterator[None]:
    """Holds the lock of the folder during the block of rank 0.

    Every rank must call it.

    Raises:
        InputError: on every rank, as `locked_folder` does on rank 0.
    """
    with contextlib.ExitStack() as stack:
        fault = ""
        if rank() == 0:
            try:
                stack.enter_context(locked_folder(folder, key))
            except InputError as error:
                fault = str(error)
        fault = broadcast_text(fault)
        if fault:
            raise InputError(fault)
        yield
