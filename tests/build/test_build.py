"""setup.py: what is built where, and what is said when something is missing."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from setuptools import Distribution

import prcl_fast
from prcl_fast.ops import native
from support.paths import ROOT

PACKAGE = Path(prcl_fast.__file__).parent
BUILD_FILE = ROOT / "build" / "native" / "build.ninja"
NO_NATIVE = os.environ.get("PRCL_NO_NATIVE", "0") not in ("", "0")


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("recipe", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["recipe"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder for PATH with ninja's needs, a compiler that only touches its output, and no nvcc."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "touch"):
        (folder / name).symlink_to(shutil.which(name) or name)
    program(folder / "c++", 'for word; do [ "$last" = -o ] && touch "$word"; last=$word; done')
    return folder


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def build(tmp_path: Path, path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext` into tmp_path/lib with only `path` on PATH."""
    folders = ("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    return setup(tmp_path, path, "build_ext", *folders, **environment)


def setup(
    tmp_path: Path, path: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`setup.py ARGUMENTS` with only `path` on PATH."""
    names = ("CUDA_PATH", "PRCL_NO_NATIVE", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    clean["CUDA_HOME"] = str(tmp_path)  # where there is no nvcc: then /usr/local/cuda is not looked at
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", *arguments]
    environment = clean | {"PATH": str(path), "CXX": str(path / "c++")} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def built(tmp_path: Path) -> list[str]:
    return sorted(file.name for file in tmp_path.glob("lib/prcl_fast/*.so"))


@pytest.mark.skipif(NO_NATIVE, reason="PRCL_NO_NATIVE is set")
def test_the_cpu_library_is_built_and_loads() -> None:
    assert native.cpu_library_error() is None


@pytest.mark.skipif(not BUILD_FILE.is_file(), reason="the libraries were not built here")
def test_the_cuda_library_holds_code_for_all_architectures_that_it_was_built_for() -> None:
    wanted = set(re.findall(r"code=(sm_\w+)", BUILD_FILE.read_text()))
    if not wanted:
        pytest.skip("the build file has no CUDA sources")
    binary = (PACKAGE / "_native_cuda.so").read_bytes()
    for architecture in wanted:
        assert re.search(architecture.encode() + rb"\b", binary), architecture


@pytest.mark.skipif(NO_NATIVE or shutil.which("nm") is None, reason="nm is not here")
def test_the_libraries_use_nothing_but_the_stable_abi() -> None:
    for library in PACKAGE.glob("_native*.so"):
        listed = subprocess.run(
            ["nm", "-uD", str(library)], capture_output=True, text=True, check=True
        ).stdout
        names = [line.split()[-1] for line in listed.splitlines()]
        assert any(name.startswith("aoti_torch_") for name in names)
        # C++ names of PyTorch (at, c10, torch) and of Python change from one version to the next.
        assert [name for name in names if re.match(r"_ZNK?(2at|3c10|5torch)|_?Py", name)] == []


def test_without_nvcc_the_cpu_library_is_built_and_one_line_says_what_is_missing(
    tmp_path: Path, tools: Path, recipe: ModuleType
) -> None:
    result = build(tmp_path, tools)
    assert result.returncode == 0, result.stderr
    assert built(tmp_path) == ["_native.so"]
    assert [line for line in result.stderr.splitlines() if "nvcc" in line] == [recipe.MISSING_NVCC]


def test_force_cuda_makes_a_missing_nvcc_an_error(tmp_path: Path, tools: Path) -> None:
    result = build(tmp_path, tools, FORCE_CUDA="1")
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1].startswith("prcl_fast: FORCE_CUDA=1, but nvcc was not found")
    assert built(tmp_path) == []


def test_nvcc_is_looked_for_in_cuda_home_on_path_and_in_the_usual_folder(
    tmp_path: Path, recipe: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {}
    for name in ("home", "path", "toolkit"):
        places[name] = tmp_path / name / "bin" / "nvcc"
        places[name].parent.mkdir(parents=True)
        program(places[name], "")
    monkeypatch.setattr(recipe, "DEFAULT_CUDA_HOME", tmp_path / "toolkit")
    monkeypatch.setenv("PATH", str(places["path"].parent))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert recipe.find_nvcc() == str(places["home"])
    monkeypatch.delenv("CUDA_HOME")
    assert recipe.find_nvcc() == str(places["path"])
    places["path"].unlink()
    assert recipe.find_nvcc() == str(places["toolkit"])
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "elsewhere"))
    assert recipe.find_nvcc() is None


@pytest.fixture
def dry_run(tmp_path: Path) -> Callable[..., str]:
    """The commands that `make ARGUMENTS` would run for a new virtual environment, on a machine with GPUs."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def run(*arguments: str, gpus: str, **environment: str) -> str:
        program(folder / "nvidia-smi", f"printf '{gpus}'")
        clean = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
        path = os.pathsep.join((str(folder), os.environ["PATH"]))
        result = subprocess.run(
            ["make", "--dry-run", f"VENV={tmp_path / 'venv'}", *arguments],
            cwd=ROOT,
            env=clean | {"PATH": path} | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return result.stdout

    return run


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")
@pytest.mark.parametrize(
    ("gpus", "wanted", "expected"),
    [
        ("8.6\\n", {}, "8.6"),
        ("9.0\\n10.0\\n9.0\\n", {}, "10.0;9.0"),
        ("", {}, "9.0"),
        ("NVIDIA-SMI has failed\\n", {}, "9.0"),
        ("6.1\\n", {}, "9.0"),  # too old for the kernels, which then run elsewhere or not at all
        ("8.6\\n", {"TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX"}, "8.0;9.0+PTX"),
    ],
)
def test_make_compiles_for_the_gpu_that_is_there(
    dry_run: Callable[..., str], gpus: str, wanted: dict[str, str], expected: str
) -> None:
    lines = [line for line in dry_run("test", gpus=gpus, **wanted).splitlines() if "ARCH_LIST" in line]
    assert len(lines) == 2  # the library, then the package, whose own build must find nothing to do
    assert all(line.startswith(f"TORCH_CUDA_ARCH_LIST='{expected}' ") for line in lines)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")
def test_make_wheel_leaves_the_architectures_to_setup_py(dry_run: Callable[..., str]) -> None:
    said = dry_run("wheel", gpus="8.6\\n")
    assert "setup.py -q build --build-base build/wheel bdist_wheel" in said
    assert "ARCH_LIST" not in said


def test_a_wheel_is_compiled_in_the_build_folder_that_it_is_given(tmp_path: Path, tools: Path) -> None:
    commands = f"""build --build-base {tmp_path}/base egg_info --egg-base {tmp_path}
        bdist_wheel --bdist-dir {tmp_path}/contents --dist-dir {tmp_path}/dist"""
    result = setup(tmp_path, tools, *commands.split())
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "base" / "native" / "build.ninja").is_file()
    (wheel,) = tmp_path.glob("dist/*-py3-none-*.whl")
    assert "prcl_fast/_native.so" in zipfile.ZipFile(wheel).namelist()


@pytest.mark.parametrize("editable", [False, True])
def test_an_editable_install_has_no_second_copy_of_the_configurations(
    tmp_path: Path, recipe: ModuleType, editable: bool
) -> None:
    command = recipe.BuildPackage(Distribution({"packages": []}))
    command.build_lib, command.editable_mode = str(tmp_path), editable
    command.ensure_finalized()
    command.run()
    assert (tmp_path / "prcl_fast" / "configs" / "demo.yaml").is_file() is not editable


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")
def test_make_wheel_tries_the_wheel_outside_the_clone(dry_run: Callable[..., str]) -> None:
    said = dry_run("wheel", "PYTHON=python9", "TORCH=torch==2.11.0", gpus="").split("bdist_wheel")[1]
    assert re.search(r"python9 -m venv .*pip install -q 'torch==2\.11\.0'.*\.whl", said, re.DOTALL)
    assert re.search(r"mktemp.*cd .*prcl train configs/demo\.yaml", said, re.DOTALL)


def test_no_native_builds_nothing(tmp_path: Path, tools: Path) -> None:
    result = build(tmp_path, tools, PRCL_NO_NATIVE="1")
    assert result.returncode == 0, result.stderr
    assert built(tmp_path) == []


def test_a_compile_error_is_shown_and_fails_the_build(tmp_path: Path, tools: Path) -> None:
    program(tools / "c++", 'echo "mls.h:7: error: expected an expression" >&2; exit 1')
    result = build(tmp_path, tools)
    assert result.returncode != 0
    assert "mls.h:7: error: expected an expression" in result.stdout + result.stderr
    assert result.stderr.splitlines()[-1].startswith("prcl_fast: the native library did not compile")


def test_a_missing_compiler_is_one_line(tmp_path: Path, tools: Path) -> None:
    (tools / "c++").unlink()
    result = build(tmp_path, tools)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert re.search(r"the C\+\+ compiler \S+ was not found", result.stderr.splitlines()[-1])


def test_a_second_build_compiles_only_what_changed(tmp_path: Path, tools: Path) -> None:
    program(
        tools / "c++",
        f'echo call >> {tmp_path}/calls; for word; do [ "$last" = -o ] && touch "$word"; last=$word; done',
    )
    build(tmp_path, tools)
    calls = len((tmp_path / "calls").read_text().splitlines())
    assert calls == len(list(ROOT.glob("csrc/cpu/*.cpp"))) + 3  # registration.cpp, interface.cpp, the link
    build(tmp_path, tools)
    assert len((tmp_path / "calls").read_text().splitlines()) == calls


def test_the_architecture_list_becomes_flags(recipe: ModuleType) -> None:
    known = {"compute_80", "compute_90", "compute_100"}
    assert recipe.architecture_flags("8.0 9.0a+PTX", known) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    default = recipe.architecture_flags(recipe.DEFAULT_ARCHES, known)
    assert default[-1] == "-gencode=arch=compute_100,code=compute_100"
    assert len(default) == 4


def test_an_architecture_that_nvcc_does_not_know_is_left_out_aloud(
    recipe: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe.architecture_flags("8.0;10.0+PTX", {"compute_80"}) == [
        "-gencode=arch=compute_80,code=sm_80"
    ]
    assert "sm_100" in capsys.readouterr().out


def test_a_malformed_architecture_list_is_named(recipe: ModuleType) -> None:
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: 'Hopper'"):
        recipe.architecture_flags("Hopper", set())


ODD_NAMES = ["my project", "a,b", "odd $x;q'u\"(o)[o]t=é:b"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_paths_with_odd_characters_are_compiled_through_links_with_plain_names(
    tmp_path: Path, tools: Path, recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    root = tmp_path / name
    for folder in ("cpu", "cuda"):
        (root / "csrc" / folder).mkdir(parents=True)
    for source in ("registration.cpp", "cpu/op.cpp", "cuda/op.cu"):
        (root / "csrc" / source).touch()
    for compiler in ("c++", "nvcc"):  # fails for a source or an include folder that is not there
        program(
            tools / compiler,
            'for word; do case "$last" in -c) cat "$word" || exit 1;; -o) touch "$word";; esac; '
            'case "$word" in -I*) cd "${word#-I}" && cd "$OLDPWD" || exit 1;; esac; last=$word; done; exit 0',
        )
    for tool in ("cat", "grep"):
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    monkeypatch.setattr(recipe, "ROOT", root)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("CXX", str(tools / "c++"))
    monkeypatch.delenv("PRCL_NO_NATIVE", raising=False)
    out = root / "build"
    out.mkdir()
    flags, found = recipe.build_flags(), recipe.extensions()
    assert [extension.name for extension in found] == ["prcl_fast._native", "prcl_fast._native_cuda"]
    text = recipe.ninja_file(flags, found, out)
    assert name not in text
    (out / "build.ninja").write_text(text)
    result = subprocess.run(
        [*recipe.ninja_command(), "-C", str(out)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
    assert {file.name for file in out.glob("*.so")} == {f"{extension.name}.so" for extension in found}


@pytest.mark.parametrize(
    ("environment", "flags"),
    [
        ({}, []),
        ({"CC": "clang"}, []),
        ({"CXX": "/opt/g++-12"}, ["-ccbin=/opt/g++-12"]),
        ({"CXX": "ccache /opt/g++ -m64"}, ["-ccbin=/opt/g++", "-Xcompiler=-m64"]),
        ({"CXX": "ccache"}, ["-ccbin=ccache"]),
        ({"CXX": "clang++", "NVCC_CCBIN": "/opt/g++-11"}, ["-ccbin=/opt/g++-11"]),
    ],
)
def test_nvcc_compiles_with_the_compiler_that_was_chosen(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], flags: list[str]
) -> None:
    for name in ("CC", "CXX", "NVCC_CCBIN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert recipe.nvcc_host_compiler(environment.get("CXX", "g++")) == flags
