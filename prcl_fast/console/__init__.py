"""The console: exit statuses, known names, lines and tables, progress on standard error.

Rich is imported where something is drawn: commands that only check a machine run without it.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prcl_fast.console.streams import standard_streams, status_of
from prcl_fast.console.text import printable
from prcl_fast.errors import InputError, RunError, fault_of_system
from prcl_fast.machine.memory import out_of_memory

if TYPE_CHECKING:
    from prcl_fast.console.plain import PlainConsole

_INTERRUPTED = 128 + 2


def run(command: Callable[[], int | None], name: str) -> int:
    """Runs a command and returns its exit status.

    InputError, RunError, faults of the system and a failed allocation of memory become one line on standard
    error, begun with `name`, and status 2 for the first, else 1. Ctrl-C gives status 130, the shell's. Any
    other exception passes, and Python prints its traceback.
    """
    with standard_streams() as output:
        try:
            status = command() or 0
        except (InputError, RunError) as error:
            note(f"{name}: {error}")
            status = 2 if isinstance(error, InputError) else 1
        except KeyboardInterrupt:
            status = _INTERRUPTED
        except SystemExit as end:
            if not isinstance(end.code, int | None):
                raise
            status = _INTERRUPTED if _after_interrupt(end) else end.code or 0
        except Exception as error:
            line = out_of_memory(error) or fault_of_system(error)
            if line is None:
                raise
            note(f"{name}: {line}")
            status = 1
    return status or status_of(output, name)


def _after_interrupt(error: BaseException) -> bool:
    """Whether Ctrl-C led to this error."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__context__
    return cause is not None


def say(line: str) -> None:
    """Prints one line on standard output, its control characters escaped."""
    print(printable(line), flush=True)


def note(line: str) -> None:
    """Prints one line on standard error, its control characters escaped."""
    print(printable(line), file=sys.stderr, flush=True)


def check_known(key: str, values: Collection[str], known: Collection[str]) -> None:
    """Raises InputError, which names `key` and the nearest known name, for a value that is not known."""
    for value in values:
        if value not in known:
            near = difflib.get_close_matches(value, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"{key}: {value!r} is not one of {', '.join(known)}{hint}")


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[int] = (),
    *,
    console: PlainConsole | None = None,
) -> None:
    """Prints rows of plain text on standard output, or on `console`; columns in `right` are right-aligned."""
    from rich.table import Table

    from prcl_fast.console.plain import PlainConsole

    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    # A pipe has no width, and rich would fold lines at 80 columns that a program may read.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 240
    console = console or PlainConsole(width=width)
    console.print(title)
    console.print(table)


@contextmanager
def counting(task: str, console: PlainConsole | None = None) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, or on `console`, if it is a terminal.

    Yields a function of (done, total).
    """
    from rich.progress import Progress

    from prcl_fast.console.plain import PlainConsole

    console = console or PlainConsole(stderr=True)
    if not console.is_terminal:  # even a disabled bar would end with an empty line
        yield lambda done, total: None
        return
    with Progress(console=console, transient=True) as bar:
        row = bar.add_task(task, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)
