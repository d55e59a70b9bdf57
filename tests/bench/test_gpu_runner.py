"""The runner of the GPU check: phases, their time limits, and the archive that they leave."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import runner
from bench.gpu.runner import CUT_OFF, FAILED, NO_TIME, PASSED, SKIPPED, Phase
from support.archives import contents
from support.paths import ROOT

GPU = {"gpu": "NVIDIA X", "native": None, "capability": "9.0", "torch": "2.11.0"}
CPU = {"gpu": None, "native": None, "torch": "2.11.0"}
# Prints the id of a child that outlives its parent and does not listen to SIGTERM.
WITH_CHILD = """
import subprocess, sys, time
child = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def python(name: str, code: str, limit: float = 20, **more: Any) -> Phase:
    return Phase(name, limit, (sys.executable, "-c", code), "", **more)


def facts_phase(facts: dict[str, Any]) -> Any:
    def phase(folder: Path) -> Phase:
        code = (
            f"import pathlib; pathlib.Path({str(folder / 'facts.json')!r}).write_text({json.dumps(facts)!r})"
        )
        return python("facts", code)

    return phase


def run_fakes(tmp_path: Path, fakes: Sequence[Phase], facts: dict[str, Any] = GPU) -> int:
    (tmp_path / "work").mkdir()
    (tmp_path / "out").mkdir()
    return runner.run_set(
        "fake", facts_phase(facts), lambda folder, facts: fakes, tmp_path / "work", tmp_path / "out"
    )


def is_gone(pid: int) -> bool:
    """Whether a process has ended, within five seconds."""
    for _ in range(50):
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
        )
        if not state.stdout.strip() or state.stdout.startswith("Z"):
            return True
        time.sleep(0.1)
    return False


def test_phases_report_how_they_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fakes = [
        python("good", "print('hello')"),
        python("bad", "import sys; print('broken'); sys.exit(3)"),
        python("slow", "import time; print('began', flush=True); time.sleep(60)", 2),
        python("left_out", "", skipped="ncu is not installed"),
        Phase("nowhere", 20, (str(tmp_path / "none"),), ""),
    ]
    assert run_fakes(tmp_path, fakes) == 1
    files = contents(tmp_path / "out" / "fake.tar.gz")
    assert set(files) == {
        "facts.json",
        "summary.json",
        *(f"{x}.log" for x in ("facts", "good", "bad", "slow", "nowhere")),
    }
    assert (files["good.log"], files["slow.log"]) == ("hello\n", "began\n")
    summary = json.loads(files["summary.json"])
    assert (summary["set"], summary["gpu"], summary["facts"]) == ("fake", "NVIDIA X", GPU)
    assert [(x["name"], x["status"]) for x in summary["phases"]] == [
        ("facts", PASSED),
        ("good", PASSED),
        ("bad", FAILED),
        ("slow", CUT_OFF),
        ("left_out", SKIPPED),
        ("nowhere", FAILED),
    ]
    details = {x["name"]: x["detail"] for x in summary["phases"]}
    assert details["bad"] == "exit status 3"
    assert details["slow"] == "its time limit ran out after 2 s"
    assert details["left_out"] == "ncu is not installed"
    assert details["nowhere"].endswith("No such file or directory")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "fake: failed or cut off: bad, slow, nowhere"
    assert sum("ncu is not installed" in line for line in lines) == 2  # as it happened, and in the table
    assert os.listdir(tmp_path / "out") == ["fake.tar.gz"]


def test_a_phase_that_does_not_say_what_it_must_has_failed(tmp_path: Path) -> None:
    def outcome(said: str) -> tuple[str, str]:
        phase = python("tests", f"print({said!r})", expects=" passed")
        found = runner.run_phase(phase, tmp_path, tmp_path / "tmp", 100.0)
        return found.status, found.detail

    assert outcome("3 passed, 2 skipped") == (PASSED, "")
    assert outcome("5 skipped") == (FAILED, "its log does not contain 'passed'")


def test_nothing_failed_where_all_passed_or_were_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes = [python("good", ""), python("other", "", skipped="no GPU")]
    assert run_fakes(tmp_path, fakes, CPU) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "fake: nothing failed; no GPU"


def test_a_phase_ends_with_its_children_when_its_time_limit_runs_out(tmp_path: Path) -> None:
    outcome = runner.run_phase(python("slow", WITH_CHILD, 5), tmp_path, tmp_path / "tmp", 100.0)
    assert outcome.status == CUT_OFF
    assert is_gone(int((tmp_path / "slow.log").read_text()))


def test_what_a_passed_phase_leaves_running_is_ended(tmp_path: Path) -> None:
    code = WITH_CHILD.removesuffix("time.sleep(60)\n")
    outcome = runner.run_phase(python("quick", code), tmp_path, tmp_path / "tmp", 100.0)
    assert outcome.status == PASSED
    assert is_gone(int((tmp_path / "quick.log").read_text()))


def test_the_time_of_the_set_cuts_a_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_LEAST", 0.1)
    phase = python("slow", "import time; time.sleep(60)")
    outcome = runner.run_phase(phase, tmp_path, tmp_path / "tmp", 1.0)
    assert (outcome.status, outcome.detail) == (CUT_OFF, "the set's time limit ran out after 1 s")


def test_a_phase_for_which_no_time_was_left_is_not_begun(tmp_path: Path) -> None:
    assert runner.run_phase(python("late", ""), tmp_path, tmp_path / "tmp", 3.0).status == NO_TIME
    assert not list(tmp_path.iterdir())


def test_temporary_files_of_a_phase_go_with_it(tmp_path: Path) -> None:
    code = "import tempfile; print(tempfile.mkdtemp())"
    assert runner.run_phase(python("untidy", code), tmp_path, tmp_path / "tmp", 100.0).status == PASSED
    left = Path((tmp_path / "untidy.log").read_text().strip())
    assert left.parent == tmp_path / "tmp"
    assert not left.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_archive_of_what_had_ended_survives_the_runner(tmp_path: Path, number: signal.Signals) -> None:
    place = tmp_path / "pid"
    code = f"""
import os, pathlib, time
print('x', flush=True)
pathlib.Path({str(place)!r}).write_text(str(os.getpid()))
time.sleep(60)
"""
    script = f"""
import sys
from bench.commands import COMMANDS
from bench.gpu import command as gpu_check
from bench.gpu.runner import Phase
def facts(folder):
    return Phase("facts", 20, (sys.executable, "-c", ""), "")
def fakes(folder, facts):
    return [Phase("good", 20, (sys.executable, "-c", "print('hello')"), ""),
            Phase("endless", 60, (sys.executable, "-c", {code!r}), "")]
gpu_check.facts_phase, gpu_check.SETS["first"] = facts, fakes
gpu_check.main(["first", "--out", {str(tmp_path / "out")!r}])
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    for _ in range(600):
        if place.is_file() and place.read_text():
            break
        time.sleep(0.1)
    pid = int(place.read_text())
    try:
        process.send_signal(number)
        status = process.wait(20)
        files = contents(tmp_path / "out" / "first.tar.gz")
        assert files["good.log"] == "hello\n"
        names = [phase["name"] for phase in json.loads(files["summary.json"])["phases"]]
        assert names == ["facts", "good"]
        assert os.listdir(tmp_path / "out") == ["first.tar.gz"]
        if number == signal.SIGTERM:  # and then the phase that ran is ended, and its log kept
            assert status == 128 + number
            assert files["endless.log"] == "x\n"
            assert is_gone(pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
