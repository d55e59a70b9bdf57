"""`python -m bench`: its list, its commands, and one line for a mistake."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from bench import commands, machine
from prcl_fast.cli import main as prcl
from prcl_fast.console import run
from prcl_fast.errors import InputError, RunError
from support.bench_command import run_bench
from support.paths import ROOT


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_all_commands_are_listed_with_a_line_of_help(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    code, out, err = run_bench(capsys, *arguments)
    assert (code, err) == (0 if arguments else 2, "")
    listed = {line.split()[0]: line for line in out.splitlines()[2:]}
    assert listed.keys() == commands.COMMANDS.keys()
    assert all(help_ in listed[name] for name, (_, help_) in commands.COMMANDS.items())


@pytest.mark.parametrize("name", list(commands.COMMANDS))
def test_every_command_shows_its_arguments(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, _ = run_bench(capsys, name, "--help")
    assert code == 0
    assert f"python -m bench {name}" in out


def test_an_unknown_command_is_one_line_with_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_bench(capsys, "same-loses")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.endswith("did you mean same-losses?\n")


@pytest.mark.parametrize("room", ["step", "scaling", "gpu"])
def test_a_rooms_module_runs_its_command(room: str) -> None:
    command = [sys.executable, "-m", f"bench.{room}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"python -m bench {room}" in done.stdout


def test_a_result_holds_the_command_that_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bench/__main__.py", "step", "data.crop=[64, 64]"])
    assert machine.describe("cpu")["command"] == "python -m bench step 'data.crop=[64, 64]'"


def test_a_broken_module_of_the_benchmarks_is_no_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ModuleNotFoundError(name=f"{name}.absent")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError):
        commands.main(["ops"])


@pytest.mark.parametrize(("error", "status"), [(InputError("a\nb"), 2), (RunError("a\nb"), 1)])
def test_an_error_is_one_line_with_its_status(
    capsys: pytest.CaptureFixture[str], error: Exception, status: int
) -> None:
    def fails() -> None:
        raise error

    assert run(fails, "name") == status
    assert capsys.readouterr().err == "name: a\\nb\n"


@pytest.mark.parametrize("arguments", [(), ("contrast", "--size", "voc"), ("--help",)])
def test_prcl_bench_names_the_command_of_the_sources(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setattr(sys, "argv", ["prcl", "bench", *arguments])
    with pytest.raises(SystemExit) as caught:
        prcl.main()
    said = capsys.readouterr()
    assert (caught.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert "python -m bench ops" in said.err
