"""Commands whose standard streams are full, closed, broken or of a small encoding, and Ctrl-C."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prcl_fast.console import run
from prcl_fast.errors import InputError

START = "import sys; sys.argv[0] = 'prcl'; from prcl_fast.cli import start; start()"


def program(text: str, **options: Any) -> subprocess.CompletedProcess[str]:
    script = f"import sys\nfrom prcl_fast.console import run\ndef command():\n {text}\n"
    script += "sys.exit(run(command, 'prcl'))"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run([sys.executable, "-c", script], text=True, check=False, **options)


FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


@needs_full
def test_a_full_standard_output_is_one_line_after_the_work_is_done() -> None:
    with FULL.open("w") as full:
        result = program("print('x' * 10**5); sys.stderr.write('done\\n')", stdout=full)
    assert result.returncode == 1
    assert result.stderr == "done\nprcl: standard output: No space left on device; the result is lost\n"


@needs_full
def test_a_full_standard_error_ends_nothing() -> None:
    with FULL.open("w") as full:
        result = program("print('a note', file=sys.stderr); print('result')", stderr=full)
    assert (result.returncode, result.stdout) == (0, "result\n")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_has_gone_is_no_error_of_the_run(stream: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = program(f"print('x' * 10**5, file=sys.{stream})", **{stream: writer})
    finally:
        os.close(writer)
    assert result.returncode == (128 + signal.SIGPIPE if stream == "stdout" else 0)
    assert not result.stdout
    assert not result.stderr


def test_the_number_of_a_closed_stream_does_not_become_that_of_a_file(tmp_path: Path) -> None:
    text = f"file = open({str(tmp_path / 'file')!r}, 'w'); print('lost'); sys.exit(file.fileno())"
    result = program(text, stdout=None, preexec_fn=lambda: (os.close(0), os.close(1)))
    assert (result.returncode > 2, result.stderr) == (True, "")


def test_characters_that_an_encoding_lacks_are_shown_by_their_numbers() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = program("print('道路'); print('é', file=sys.stderr)", env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, "\\u9053\\u8def\n", "\\xe9\n")
    result = program("print('\\udcff')")
    assert (result.returncode, result.stdout) == (0, "\\udcff\n")


def test_an_error_of_the_system_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def command() -> None:
        os.listdir(tmp_path / "none")

    assert run(command, "prcl") == 1
    assert capsys.readouterr().err == f"prcl: {tmp_path}/none: No such file or directory\n"


def test_a_full_disk_and_a_lack_of_memory_are_one_line_without_a_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number, line in (
        (errno.ENOSPC, "No space left on device"),
        (errno.ENOMEM, "out of memory; lower train.batch_labeled"),
    ):

        def command(number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        assert run(command, "prcl") == 1
        assert capsys.readouterr().err.startswith(f"prcl: {line}")


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    result = program("import socket; socket.socket().getpeername()")
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback")
    assert "Transport endpoint is not connected" in result.stderr


def test_the_streams_are_the_former_ones_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise InputError("no")

    before = sys.stdout, sys.stderr
    assert run(command, "prcl") == 2
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize("moment", ["typer", "prcl_fast.cli.main", "torch", "prcl_fast.config"])
def test_ctrl_c_while_the_command_starts_shows_no_traceback(tmp_path: Path, moment: str) -> None:
    """Ctrl-C comes with the import of `moment`."""
    script = f"""
import builtins, os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
plain, sent = builtins.__import__, []
def importing(name, *rest):
    if name == {moment!r} and not sent:
        sent.append(name)
        os.kill(os.getpid(), signal.SIGINT)
    return plain(name, *rest)
import prcl_fast.cli
builtins.__import__ = importing
{START}
"""
    command = [sys.executable, "-c", script, "train", "demo", f"output={tmp_path / 'run'}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr
    assert result.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert not (tmp_path / "run").exists()
