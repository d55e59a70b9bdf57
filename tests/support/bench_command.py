"""`python -m bench` inside the test's process."""

from __future__ import annotations

import pytest

from bench.commands import main


def run_bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `python -m bench ARGUMENTS`."""
    try:
        code: object = main(arguments)
    except SystemExit as caught:
        code = caught.code or 0
    said = capsys.readouterr()
    assert isinstance(code, int)
    return code, said.out, said.err
