"""`bench gpu-bundle`: contents and size of the bundle, and unpacking of its wheels."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from bench.gpu import bundle, wheels
from bench.gpu.bundle import required_packages, shrink, write_bundle
from bench.gpu.wheels import Wheel, unpack_missing
from prcl_fast.errors import InputError

HERE = f"manylinux_2_17_{platform.machine()}"
ABSENT = "absentpackage"  # not installed anywhere


def checkout(root: Path) -> Path:
    """A git checkout of a few files, and the libraries, which are not tracked."""
    for name in (
        "prcl_fast/__init__.py",
        "bench/gpu/gpu_check.sh",
        "bench/results/large.json",
        "tests/test_op.py",
        "tests/golden/large.npz",
        "docs/page.md",
        "setup.py",
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (root / "pyproject.toml").write_text('dependencies = ["torch>=2.11", "numpy>=1.26"]\n')
    git = ("git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x")
    for command in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "x")):
        subprocess.run([*git, *command], check=True)
    for name in (*bundle._LIBRARIES, "bench/untracked.py"):
        (root / name).write_bytes(b"library")
    return root


def wheel(folder: Path, name: str, *requires: str, **files: str) -> Path:
    """A wheel with one module, requirements and more files."""
    path = folder / name
    package = name.split("-")[0]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{package}/__init__.py", "")
        lines = "".join(f"Requires-Dist: {line}\n" for line in requires)
        archive.writestr(f"{package}-1.dist-info/METADATA", f"Name: {package}\n{lines}")
        for file, text in files.items():
            archive.writestr(file, text)
    return path


def test_a_bundle_holds_sources_libraries_wheels_and_commit(tmp_path: Path) -> None:
    root = checkout(tmp_path / "root")
    needed = wheel(tmp_path, "needed-1-py3-none-any.whl")
    assert write_bundle(root, tmp_path / "out" / "bundle.tar.gz", [needed]) == []
    with tarfile.open(tmp_path / "out" / "bundle.tar.gz") as tar:
        tar.extractall(tmp_path / "there", filter="data")
    found = {str(x.relative_to(tmp_path / "there")) for x in (tmp_path / "there").rglob("*") if x.is_file()}
    assert found == {
        "COMMIT", "gpu_check.sh", "setup.py", "pyproject.toml", "prcl_fast/__init__.py", *bundle._LIBRARIES,
        "bench/gpu/gpu_check.sh", "tests/test_op.py", "wheels/requirements.txt", f"wheels/{needed.name}",
    }  # fmt: skip
    head = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    assert (tmp_path / "there" / "COMMIT").read_text() == head.stdout
    assert (tmp_path / "there" / "wheels" / "requirements.txt").read_text() == "torch>=2.11\nnumpy>=1.26\n"


def test_a_bundle_without_a_library_is_refused(tmp_path: Path) -> None:
    root = checkout(tmp_path / "root")
    (root / bundle._LIBRARIES[1]).unlink()
    with pytest.raises(InputError, match=r"_native_cuda.so was not built: nvcc must be on PATH"):
        write_bundle(root, tmp_path / "bundle.tar.gz", [])


def test_a_bundle_outside_a_checkout_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    for name in bundle._LIBRARIES:
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).touch()
    with pytest.raises(InputError, match="is no git checkout"):
        write_bundle(tmp_path / "root", tmp_path / "bundle.tar.gz", [])


def test_a_bundle_that_is_too_large_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    root = checkout(tmp_path / "root")
    with pytest.raises(InputError, match=r"bundle.tar.gz would have \d+ bytes, more than 500"):
        write_bundle(root, tmp_path / "out" / "bundle.tar.gz", [], largest=500)
    assert not list((tmp_path / "out").iterdir())


def test_optional_wheels_are_taken_from_the_smallest_on_while_they_fit(tmp_path: Path) -> None:
    root = checkout(tmp_path / "root")
    noise = bytes(i * i % 251 for i in range(40000)).hex()
    sizes = {"large": 60000, "small": 1000, "middle": 9000}
    optional = [wheel(tmp_path, f"{x}-1-py3-none-any.whl", x=noise[:size]) for x, size in sizes.items()]
    out = tmp_path / "bundle.tar.gz"
    assert write_bundle(root, out, [], optional, largest=20000) == ["large-1-py3-none-any.whl"]
    assert out.stat().st_size <= 20000
    with tarfile.open(out) as tar:
        names = {name for name in tar.getnames() if name.endswith(".whl")}
    assert names == {"wheels/small-1-py3-none-any.whl", "wheels/middle-1-py3-none-any.whl"}


def test_packages_come_with_what_they_need_in_the_versions_of_this_environment() -> None:
    found = required_packages("3.12")
    assert {"pydantic", "pydantic-core", "annotated-types", "pytest", "pluggy", "tensorboard"} <= set(found)
    assert not {"torch", "grpcio", "colorama", "exceptiongroup"} & set(found)
    assert all(importlib.metadata.version(name) == version for name, version in found.items())


def test_a_package_whose_version_is_not_known_is_refused() -> None:
    with pytest.raises(InputError, match=f"{ABSENT} is not installed here"):
        required_packages("3.12", (ABSENT,))


def test_a_failing_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "WARNING: x\nERROR: No matching distribution found for absent==1\n"
    monkeypatch.setattr(
        bundle.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said)
    )
    with pytest.raises(InputError) as caught:
        bundle.download({"absent": "1"}, "3.12", tmp_path)
    assert str(caught.value) == (
        "pip cannot download wheels for Python 3.12: ERROR: No matching distribution found for absent==1"
    )


def test_a_wheel_leaves_its_own_tests_behind(tmp_path: Path) -> None:
    path = wheel(
        tmp_path, "numbers-1-py3-none-any.whl", **{"numbers/tests/large.py": "", "numbers/testing.py": "x"}
    )
    shrink(path)
    with zipfile.ZipFile(path) as archive:
        assert sorted(archive.namelist()) == [
            "numbers-1.dist-info/METADATA",
            "numbers/__init__.py",
            "numbers/testing.py",
        ]


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("a-1-py3-none-any.whl", True),
        ("a-1-py2.py3-none-any.whl", True),
        ("a-1-py2-none-any.whl", False),
        (f"a-1-py3-none-manylinux2014_x86_64.{HERE}.whl", True),
        (f"a-1-cp312-cp312-{HERE}.whl", True),
        (f"a-1-cp311-cp311-{HERE}.whl", False),
        (f"a-1-cp39-abi3-{HERE}.whl", True),
        (f"a-1-cp313-abi3-{HERE}.whl", False),
        ("a-1-cp312-cp312-manylinux_2_17_another.whl", False),
    ],
)
def test_a_wheel_fits_a_python_and_a_processor(name: str, fits: bool) -> None:
    assert Wheel(Path(name)).fits((3, 12)) == fits


def test_only_missing_packages_are_unpacked(tmp_path: Path) -> None:
    wheel(tmp_path, f"{ABSENT}-1-py3-none-any.whl")
    wheel(tmp_path, "pytest-99-py3-none-any.whl")
    wheel(tmp_path, f"{ABSENT}2-1-cp27-cp27m-{HERE}.whl")
    (tmp_path / wheels.REQUIREMENTS).write_text("pytest>=7\n")
    assert unpack_missing(tmp_path, tmp_path / "site") == [ABSENT]
    assert sorted(x.name for x in (tmp_path / "site").iterdir()) == [ABSENT, f"{ABSENT}-1.dist-info"]
    code = f"import {ABSENT}; print({ABSENT}.__file__)"
    environment = {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(tmp_path / "site" / ABSENT / "__init__.py")


@pytest.mark.parametrize(
    ("asked", "requires", "taken"),
    [
        ("pytest>=7", (), False),
        ("pytest>=98.1", (), True),  # of the sources
        ("", ("pytest>=98.1,<100",), True),  # of a wheel that is unpacked
        ("", ("pytest==98.1",), True),
        ("", ("pytest>=98.1 ; extra == 'all'",), False),
        ("", ("pytest (>=7.0)",), False),
    ],
)
def test_a_package_that_is_too_old_is_unpacked_as_well(
    tmp_path: Path, asked: str, requires: tuple[str, ...], taken: bool
) -> None:
    wheel(tmp_path, f"{ABSENT}-1-py3-none-any.whl", *requires)
    wheel(tmp_path, "pytest-99-py3-none-any.whl")
    (tmp_path / wheels.REQUIREMENTS).write_text(asked)
    assert ("pytest" in unpack_missing(tmp_path, tmp_path / "site")) == taken
