"""`bench gpu` on a machine without a GPU: its phases, its script and its archives."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.commands import COMMANDS
from bench.gpu import bundle, phases, runner
from bench.gpu import command as gpu_check
from bench.gpu.runner import PASSED, SKIPPED
from bench.ops import CANDIDATES, OPS
from bench.step.data import SIZES
from bench.step.worker import CANDIDATES as STEP_CANDIDATES
from prcl_fast.config import load_config
from prcl_fast.ops import native
from support.archives import contents
from support.bench_command import run_bench
from support.paths import ROOT

GPU = {"gpu": "NVIDIA X", "native": None, "capability": "9.0", "torch": "2.11.0"}
CPU = {"gpu": None, "native": None, "torch": "2.11.0"}


@pytest.mark.parametrize("name", list(phases.SETS))
@pytest.mark.parametrize("facts", [GPU, CPU], ids=["gpu", "cpu"])
def test_the_phases_of_a_set_run_what_exists(tmp_path: Path, name: str, facts: dict[str, Any]) -> None:
    found = [phases.facts_phase(tmp_path), *phases.SETS[name](tmp_path, facts)]
    names = [phase.name for phase in found]
    assert len(set(names)) == len(names)
    for phase in found:
        words = list(map(str, phase.command))
        assert 0 < phase.limit <= 130
        commands = [words[i + 1] for i, word in enumerate(words) if word == "bench"]
        assert set(commands) <= COMMANDS.keys()
        assert all((ROOT / word).is_file() for word in words if word.startswith("tests/"))
        values = dict(itertools.pairwise(words))
        known = STEP_CANDIDATES if commands == ["step"] else CANDIDATES
        assert set(values.get("--candidates", "native").split(",")) <= {*known, "native"}
        if commands == ["ops"]:
            arguments = words[words.index("ops") + 1 :]
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
    assert phases.first(tmp_path, GPU)[0].skipped == "the bundled library runs on this GPU"


def test_the_tests_of_every_op_are_among_those_on_a_gpu() -> None:
    named = {Path(file).stem.removeprefix("test_") for file in phases.op_tests()}
    assert named >= set(OPS) - {"contrast"}


def test_the_runner_needs_neither_pytorch_nor_pydantic_nor_pytest() -> None:
    missing = ("torch", "numpy", "pydantic", "typer", "rich", "yaml", "pytest", "packaging")
    code = f"import sys; sys.modules |= dict.fromkeys({missing})\nfrom bench.commands import main"
    code += "\nmain(['gpu', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "gpu first second" in done.stdout, done.stderr


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
    if reason := native.unavailable("cpu"):
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
    code, _, said = run_bench(capsys, "gpu", "unpack", str(archive), "--into", str(tmp_path / "results"))
    assert (code, said) == (2, f"bench gpu: {archive}: {reason}\n")
    assert not (tmp_path / "results").exists()


def test_a_truncated_archive_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = archive_of(tmp_path / "first.tar.gz", {"kind": runner.KIND, "set": "first", "gpu": "X" * 4000})
    archive.write_bytes(archive.read_bytes()[:60])
    code, _, said = run_bench(capsys, "gpu", "unpack", str(archive))
    assert code == 2
    assert said.startswith(f"bench gpu: {archive}: ")
    assert said.count("\n") == 1
