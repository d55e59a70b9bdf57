"""Wheels of a bundle: unpacks those whose package the machine lacks.

Pip is not used: the machine may lack it, or its configuration may forbid these versions.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REQUIREMENTS = "requirements.txt"  # beside the wheels: versions that the sources need
_PYTHON = sys.version_info[:2]
_TERM = re.compile(r"(>=|==)\s*([\d.]+)")


@dataclass(frozen=True)
class Wheel:
    """A wheel file with its parsed name, NAME-VERSION-PYTHON-ABI-PLATFORM.whl."""

    path: Path

    @property
    def package(self) -> str:
        return normalized(self.path.name.split("-")[0])

    def fits(self, python: tuple[int, int] = _PYTHON) -> bool:
        """Whether it is for this Python and this machine's processor."""
        tags, abi, places = self.path.stem.split("-")[-3:]
        here = f"cp{python[0]}{python[1]}"
        if abi == "none":
            right = "py3" in tags.split(".")
        elif abi == "abi3":  # of this Python or of an older one
            right = min(int(tag.removeprefix("cp3")) for tag in tags.split(".")) <= python[1]
        else:
            right = tags == here
        return right and (places == "any" or places.endswith(f"_{platform.machine()}"))

    def requirements(self) -> list[str]:
        """Its unconditional requirements (Requires-Dist)."""
        with zipfile.ZipFile(self.path) as archive:
            name = next(x for x in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", x))
            lines = archive.read(name).decode().splitlines()
        found = [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ")]
        return [requirement for requirement in found if ";" not in requirement]


def unpack_missing(folder: Path, site: Path, python: tuple[int, int] = _PYTHON) -> list[str]:
    """Unpacks into `site` each wheel of `folder` whose package is missing or too old.

    An installed package is kept, unless the sources or an unpacked wheel need a newer one, because other
    packages of the machine may have been built for it.

    Returns:
        The unpacked packages.
    """
    wheels = {wheel.package: wheel for wheel in map(Wheel, folder.glob("*.whl")) if wheel.fits(python)}
    text = folder / REQUIREMENTS
    asked = text.read_text().split("\n") if text.is_file() else []
    taken = {name for name in wheels if _installed(name) is None}
    while True:
        everything = [*asked, *(line for name in taken for line in wheels[name].requirements())]
        more = {name for name in _unsatisfied(everything) if name in wheels} - taken
        if not more:
            break
        taken |= more
    for name in taken:
        with zipfile.ZipFile(wheels[name].path) as archive:
            archive.extractall(site)
    return sorted(taken)


def normalized(name: str) -> str:
    """A package's name as normalised by the package index."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _unsatisfied(requirements: Sequence[str]) -> Iterator[str]:
    """Installed packages whose version some requirement excludes by >= or ==."""
    for requirement in requirements:
        match = re.match(r"[A-Za-z0-9._-]+", requirement)
        version = _installed(match[0]) if match else None
        if match is None or version is None:
            continue
        here = _release(version)
        for sign, bound in _TERM.findall(requirement):
            if here < _release(bound) if sign == ">=" else here != _release(bound):
                yield normalized(match[0])


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version, without trailing zeros: 2.11.0+cu130 is (2, 11)."""
    match = re.match(r"[\d.]+", version)
    numbers = [int(part) for part in (match[0] if match else "0").split(".") if part]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
