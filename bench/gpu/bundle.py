"""A bundle for a machine with a GPU and no network: sources, native libraries, and wheels.

python -m bench gpu-bundle [--out FILE] [--without PACKAGE ...]

On that machine: `tar xf FILE; bash gpu_check.sh first`; Linux, x86-64, Python 3.12, PyTorch 2.11 or newer.
The wheels have the versions of this environment. They are for Python 3.12 and, if the size allows, for the
Python that makes the bundle, so that it can be tested here. Making it needs the network.
"""

from __future__ import annotations

import importlib.metadata
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from packaging.requirements import Requirement

from bench.arguments import parser
from bench.gpu.wheels import REQUIREMENTS, normalized
from prcl_fast.errors import InputError
from prcl_fast.files.writing import replacing

LARGEST = 60_000_000  # bytes
PYTHON = "3.12"  # of such a machine
_ROOT = Path(__file__).resolve().parents[2]
_OUT = _ROOT / "dist" / "prcl_fast_gpu_check.tar.gz"
_LIBRARIES = ("prcl_fast/_native.so", "prcl_fast/_native_cuda.so")
_SOURCES = ("prcl_fast", "bench", "tests", "configs", "csrc", "setup.py", "pyproject.toml", "constraints.txt")
_LEFT_OUT = ("bench/results/", "tests/golden/", "tests/fuzz/corpus/")  # large, and not used by any phase
_SCRIPT = "bench/gpu/gpu_check.sh"
# Imported by the phases besides PyTorch; SciPy, for the tests of two samplers, is too large.
_PACKAGES = (
    "numpy", "pillow", "pyyaml", "pydantic", "typer", "rich", "pytest", "pytest-timeout", "pytest-xdist",
    "ninja", "setuptools", "tensorboard",
)  # fmt: skip
# For TensorBoard's server; a run only writes its files.
_NOT_NEEDED = {"grpcio", "markdown", "tensorboard-data-server", "werkzeug"}
_UNREAD = re.compile(r"/tests/|^tensorboard/(webfiles\.zip|plugins/projector/tf_projector_plugin/)")
_PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
)


def sources(root: Path) -> list[str]:
    """The tracked files that a check needs. Raises InputError outside a git checkout."""
    listed = _git(root, "ls-files", "-z", "--", *_SOURCES).split("\0")
    found = [name for name in listed if name and not name.startswith(_LEFT_OUT)]
    # A file that is tracked may have been removed from the working tree.
    return [name for name in found if (root / name).is_file()]


def required_packages(python: str, packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """The packages and their dependencies on Linux under this Python, with this environment's versions.

    Raises:
        InputError: one of them is not installed here.
    """
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    found: dict[str, str] = {}
    left = list(packages)
    while left:
        name = normalized(left.pop())
        if name in found or name in _NOT_NEEDED:
            continue
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise InputError(f"{name} is not installed here, so its version is not known: run make") from None
        for requirement in map(Requirement, importlib.metadata.requires(name) or ()):
            if requirement.marker is None or requirement.marker.evaluate(environment):
                left.append(requirement.name)
    return dict(sorted(found.items()))


def download(packages: Mapping[str, str], python: str, folder: Path) -> None:
    """Downloads the packages' wheels for a Python on Linux, x86-64, into `folder`. Raises InputError."""
    command = [
        sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
        "--implementation", "cp", "--python-version", python, "-d", str(folder),
        *(f"--platform={name}" for name in _PLATFORMS),
        *(f"{name}=={version}" for name, version in packages.items()),
    ]  # fmt: skip
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [
            done.stderr.strip()
        ]
        raise InputError(f"pip cannot download wheels for Python {python}: {lines[-1]}")


def shrink(wheel: Path) -> None:
    """Removes files that no phase reads: a wheel's own tests, and TensorBoard's pages."""
    with zipfile.ZipFile(wheel) as archive:
        kept = [x for x in archive.infolist() if not _UNREAD.search(x.filename)]
        if len(kept) == len(archive.infolist()):
            return
        with (
            replacing(wheel) as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as less,
        ):
            for info in kept:
                less.writestr(info.filename, archive.read(info))


def write_bundle(
    root: Path, out: Path, wheels: Iterable[Path], optional: Iterable[Path] = (), largest: int = LARGEST
) -> list[str]:
    """Writes the bundle atomically.

    Args:
        wheels: required ones.
        optional: added from the smallest on while they fit.
        largest: limit of the file in bytes.

    Returns:
        The names of the optional wheels that were left out.

    Raises:
        InputError: a library is not built, `root` is no git checkout, or the file would be too large.
    """
    for library in _LIBRARIES:
        if not (root / library).is_file():
            raise InputError(
                f"{library} was not built: nvcc must be on PATH or in CUDA_HOME when make builds it"
            )
    commit = _git(root, "describe", "--always", "--dirty", "--exclude=*").strip()
    text = (root / "pyproject.toml").read_text()
    asked = "\n".join(re.findall(r'"([A-Za-z-]+>=[\d.]+)"', text)) + "\n"
    files = {name: root / name for name in (*sources(root), *_LIBRARIES)}
    files |= {f"wheels/{path.name}": path for path in wheels}
    extra = sorted(optional, key=lambda path: path.stat().st_size)
    with replacing(out) as file:
        _write(file, files, root, commit, asked)
        left = largest - file.tell()
        if left < 0:
            size = largest - left
            raise InputError(f"{out.name} would have {size} bytes, more than {largest}; see --without")
        # Wheels are already compressed: each adds its size, a header and padding.
        while extra and (added := int(1.001 * extra[0].stat().st_size) + 1024) <= left:
            wheel = extra.pop(0)
            left -= added
            files[f"wheels/{wheel.name}"] = wheel
        file.seek(0)
        file.truncate()
        _write(file, files, root, commit, asked)
    return [path.name for path in extra]


def _write(archive: BinaryIO, files: Mapping[str, Path], root: Path, commit: str, asked: str) -> None:
    def without_owner(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in (("COMMIT", commit + "\n"), (f"wheels/{REQUIREMENTS}", asked)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content.encode()))
        tar.add(root / _SCRIPT, "gpu_check.sh", filter=without_owner)
        for name, path in sorted(files.items()):
            tar.add(path, name, filter=without_owner)


def _git(root: Path, *arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        raise InputError(f"{root} is no git checkout; a bundle contains its tracked files") from None


def main(arguments: Sequence[str]) -> None:
    """`python -m bench gpu-bundle`."""
    command = parser("gpu-bundle", __doc__)
    command.add_argument("--out", type=Path, default=_OUT, metavar="FILE", help="the bundle")
    command.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="a package that the machine has; may be repeated",
    )
    options = command.parse_args(arguments)
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    left_out = {normalized(name) for name in options.without}
    with tempfile.TemporaryDirectory(prefix="prcl_wheels_") as folder:
        found: dict[str, list[Path]] = {}
        for python in dict.fromkeys((PYTHON, own)):
            place = Path(folder) / python
            packages = required_packages(python)
            download({x: packages[x] for x in packages if x not in left_out}, python, place)
            found[python] = sorted(place.glob("*.whl"))
            for wheel in found[python]:
                shrink(wheel)
        needed = {wheel.name for wheel in found[PYTHON]}
        optional = [wheel for wheel in found[own] if wheel.name not in needed]
        dropped = write_bundle(_ROOT, options.out, found[PYTHON], optional)
    for name in dropped:
        print(f"left out, as the file would be too large: {name}")
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")
