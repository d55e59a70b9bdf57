"""The check on a machine with a GPU: what can be known of it without one."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import CANDIDATES, OPS
from bench.gpu import __main__ as gpu_check
from bench.gpu import bundle, phases, runner
from bench.gpu.runner import CUT_OFF, FAILED, NO_TIME, PASSED, SKIPPED, Phase
from bench.step.data import SIZES
from bench.step.worker import CANDIDATES as STEP_CANDIDATES
from prcl_fast.config import load_config
from prcl_fast.ops import _native
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


def python(name: str, code: str, box: float = 20, **more: Any) -> Phase:
    return Phase(name, box, (sys.executable, "-c", code), "", **more)


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


def contents(archive: Path) -> dict[str, str]:
    with tarfile.open(archive) as tar:
        files = {member.name: tar.extractfile(member) for member in tar}
        return {name: file.read().decode() for name, file in files.items() if file is not None}


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
    assert details["slow"] == "its box ran out after 2 s"
    assert details["left_out"] == "ncu is not installed"
    assert details["nowhere"].endswith("No such file or directory")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "fake: failed or cut off: bad, slow, nowhere"
    assert sum("ncu is not installed" in line for line in lines) == 2  # as it happened, and in the table
    assert os.listdir(tmp_path / "out") == ["fake.tar.gz"]


def test_a_phase_that_does_not_say_what_it_must_has_failed(tmp_path: Path) -> None:
    def outcome(said: str) -> tuple[str, str]:
        phase = python("tests", f"print({said!r})", says=" passed")
        found = runner.run_phase(phase, tmp_path, tmp_path / "tmp", 100.0)
        return found.status, found.detail

    assert outcome("3 passed, 2 skipped") == (PASSED, "")
    assert outcome("5 skipped") == (FAILED, "its log does not say 'passed'")


def test_nothing_failed_where_all_passed_or_were_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes = [python("good", ""), python("other", "", skipped="no GPU")]
    assert run_fakes(tmp_path, fakes, CPU) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "fake: nothing failed; no GPU"


def test_a_phase_ends_with_its_children_when_its_box_runs_out(tmp_path: Path) -> None:
    outcome = runner.run_phase(python("slow", WITH_CHILD, 5), tmp_path, tmp_path / "tmp", 100.0)
    assert outcome.status == CUT_OFF
    assert is_gone(int((tmp_path / "slow.log").read_text()))


def test_what_a_passed_phase_leaves_running_is_ended(tmp_path: Path) -> None:
    code = WITH_CHILD.removesuffix("time.sleep(60)\n")
    outcome = runner.run_phase(python("quick", code), tmp_path, tmp_path / "tmp", 100.0)
    assert outcome.status == PASSED
    assert is_gone(int((tmp_path / "quick.log").read_text()))


def test_the_time_of_the_set_cuts_a_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_LEAST", 0.1)
    phase = python("slow", "import time; time.sleep(60)")
    outcome = runner.run_phase(phase, tmp_path, tmp_path / "tmp", 1.0)
    assert (outcome.status, outcome.detail) == (CUT_OFF, "the set's time ran out after 1 s")


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
from bench.gpu import __main__ as gpu_check
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


@pytest.mark.parametrize("name", list(phases.SETS))
@pytest.mark.parametrize("facts", [GPU, CPU], ids=["gpu", "cpu"])
def test_the_phases_of_a_set_run_what_exists(tmp_path: Path, name: str, facts: dict[str, Any]) -> None:
    found = [phases.facts_phase(tmp_path), *phases.SETS[name](tmp_path, facts)]
    names = [phase.name for phase in found]
    assert len(set(names)) == len(names)
    for phase in found:
        words = list(map(str, phase.command))
        assert 0 < phase.box <= 130
        for module in [words[i + 1] for i, word in enumerate(words) if word == "-m" and "." in words[i + 1]]:
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
        assert all((ROOT / word).is_file() for word in words if word.startswith("tests/"))
        values = dict(itertools.pairwise(words))
        known = STEP_CANDIDATES if "bench.step" in words else CANDIDATES
        assert set(values.get("--candidates", "native").split(",")) <= {*known, "native"}
        if "bench" in words:
            arguments = words[words.index("bench") + 1 :]
            ops = list(itertools.takewhile(lambda word: not word.startswith("--"), arguments))
            assert ops
            assert set(ops) <= set(OPS)
        assert values.get("--size", "small") in SIZES
        overrides = [word for word in words if word.startswith(("train.", "method."))]
        load_config(ROOT / "configs" / "demo.yaml", overrides)


def test_the_profile_of_the_step_comes_right_after_the_smoke_test(tmp_path: Path) -> None:
    assert [x.name for x in phases.first(tmp_path, GPU)][:3] == ["build", "smoke", "step"]


def test_a_phase_whose_tool_is_missing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    broken = GPU | {"native": "did not load"}
    reasons = {x.name: x.skipped for name in phases.SETS for x in phases.SETS[name](tmp_path, broken)}
    assert {name: reason for name, reason in reasons.items() if reason} == {
        "build": "nvcc is not installed",
        "memcheck": "compute-sanitizer is not installed",
        "racecheck": "compute-sanitizer is not installed",
        "ncu": "ncu is not installed",
    }


def test_a_library_that_does_not_load_is_built_for_this_gpu_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: name)
    build = phases.first(tmp_path, GPU | {"native": "did not load"})[0]
    assert (build.skipped, build.environment["TORCH_CUDA_ARCH_LIST"]) == (None, "9.0")
    assert phases.first(tmp_path, GPU)[0].skipped == "the library that came along runs here"


def test_the_tests_of_every_op_are_among_those_on_a_gpu() -> None:
    named = {Path(file).stem.removeprefix("test_") for file in phases.op_tests()}
    assert named >= set(OPS) - {"contrast"}


def test_the_runner_needs_neither_pytorch_nor_pydantic_nor_pytest() -> None:
    missing = ("torch", "numpy", "pydantic", "typer", "rich", "yaml", "pytest", "packaging")
    code = f"import sys; sys.modules |= dict.fromkeys({missing}); import bench.gpu.__main__; print('fine')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "fine\n", done.stderr


def test_the_script_takes_its_own_sources_wherever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").write_text("raise SystemExit('another project')")
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu" / "gpu_check.sh"), "third"],
        cwd=tmp_path,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "invalid choice: 'third'" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", list(phases.SETS))
def test_a_set_ends_without_a_gpu_and_says_so(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From an unpacked bundle, whose wheels are not needed here."""
    if reason := _native.unavailable("cpu"):
        pytest.skip(reason)
    libraries = [library for library in bundle._LIBRARIES if (ROOT / library).is_file()]
    monkeypatch.setattr(bundle, "_LIBRARIES", libraries)
    bundle.write_bundle(ROOT, tmp_path / "bundle.tar.gz", [])
    with tarfile.open(tmp_path / "bundle.tar.gz") as tar:
        tar.extractall(tmp_path / "there", filter="data")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        ["bash", "there/gpu_check.sh", name, "--out", "out"],
        cwd=tmp_path,
        env=environment | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-2:] == [
        f"{name}: nothing failed; no GPU",
        str(tmp_path / "out" / f"{name}.tar.gz"),
    ]
    files = contents(tmp_path / "out" / f"{name}.tar.gz")
    summary = json.loads(files["summary.json"])
    assert summary["gpu"] is None
    assert summary["commit"] == (tmp_path / "there" / "COMMIT").read_text().strip()
    statuses = {x["name"]: (x["status"], x["detail"]) for x in summary["phases"]}
    passed = {"first": {"facts", "smoke", "step", "probabilistic_info_nce", "native_tests"}}
    passed["second"] = {"facts", "captured", "native_triton", "triton_tests", "bench_step"}
    assert {x for x in statuses if statuses[x][0] == PASSED} == passed[name]
    assert all(statuses[x] == (SKIPPED, "no GPU") for x in set(statuses) - passed[name])
    assert all(f"{x}.log" in files for x in passed[name])


def archive_of(path: Path, summary: dict[str, Any], **files: str) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in {"summary.json": json.dumps(summary), **files}.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


def test_the_results_of_an_archive_are_unpacked_under_names_of_their_own(tmp_path: Path) -> None:
    summary = {"kind": runner.KIND, "set": "first", "gpu": "NVIDIA X"}
    files = {"step.json": '{"ms": [1]}', "facts.json": "{}", "step.log": "x", "../outside.json": "{}"}
    archive = archive_of(tmp_path / "first.tar.gz", summary, **files)
    assert gpu_check.main(["unpack", str(archive), "--into", str(tmp_path / "results")]) == 0
    assert sorted(os.listdir(tmp_path / "results")) == ["gpu_first.json", "gpu_step.json"]
    assert (tmp_path / "results" / "gpu_step.json").read_text() == '{"ms": [1]}'
    assert json.loads((tmp_path / "results" / "gpu_first.json").read_text()) == summary
    assert not (tmp_path / "outside.json").exists()


@pytest.mark.parametrize(
    ("summary", "reason"),
    [
        ({"kind": runner.KIND, "set": "first", "gpu": None}, "was made without a GPU"),
        ({"kind": "another"}, "holds no summary of a GPU check"),
        ({"kind": runner.KIND, "set": "../x", "gpu": "NVIDIA X"}, "holds no summary of a GPU check"),
    ],
)
def test_an_archive_without_a_gpus_results_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], summary: dict[str, Any], reason: str
) -> None:
    archive = archive_of(tmp_path / "first.tar.gz", summary)
    assert gpu_check.main(["unpack", str(archive), "--into", str(tmp_path / "results")]) == 2
    assert capsys.readouterr().err == f"gpu_check: {archive}: {reason}\n"
    assert not (tmp_path / "results").exists()


def test_a_truncated_archive_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = archive_of(tmp_path / "first.tar.gz", {"kind": runner.KIND, "set": "first", "gpu": "X" * 4000})
    archive.write_bytes(archive.read_bytes()[:60])
    assert gpu_check.main(["unpack", str(archive)]) == 2
    assert capsys.readouterr().err.startswith(f"gpu_check: {archive}: ")
