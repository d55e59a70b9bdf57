"""The `prcl` command in the process of a test."""

from __future__ import annotations

import sys

from prcl_fast.cli.main import main


def prcl(*arguments: str) -> int:
    """The exit status of `prcl ARGUMENTS`."""
    argv, sys.argv = sys.argv, ["prcl", *arguments]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = argv
    raise AssertionError("the entry point always exits")
