"""Missing packages of a benchmark: one line instead of a traceback."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def needed(command: str | None) -> Iterator[None]:
    """Surrounds a command's imports: one that is not installed ends it with a line and exit status 2.

    The ops and their checks do without most of the package's dependencies; what trains does not.

    Args:
        command: what is run, such as bench.step; None where the module is imported, which then fails as any
            other does.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if command is None or package in ("", "bench", "prcl_fast"):
            raise
        print(f"{command}: needs the package {package}, which is not installed", file=sys.stderr)
        sys.exit(2)
