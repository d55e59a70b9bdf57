"""Tables on standard output and progress on standard error."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from prcl_fast.errors import InputError


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()
) -> None:
    """Prints rows of plain text; `right` are the columns that are aligned to the right."""
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    # A pipe has no width: rich would fold at 80 columns what a program may want to read.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 240
    console = Console(width=width)
    console.print(Text(title))
    console.print(table)


@contextmanager
def counting(task: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, where that is a terminal; gives what is called with (done, total)."""
    console = Console(stderr=True)
    if not console.is_terminal:  # even a disabled bar would end with an empty line
        yield lambda done, total: None
        return
    with Progress(console=console, transient=True) as bar:
        row = bar.add_task(task, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)


def check_known(key: str, values: Collection[str], known: Collection[str]) -> None:
    """Raises InputError, which names `key` and the nearest known name, for a value that is not known."""
    for value in values:
        if value not in known:
            near = difflib.get_close_matches(value, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"{key}: {value!r} is not one of {', '.join(known)}{hint}")
