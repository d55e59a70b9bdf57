"""The import law: a room imports only itself and the rooms before it in one ordered list."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from support.paths import PACKAGE

# From the ground up. A room is a folder of the package, or a module beside the folders.
ROOMS = (
    "errors",
    "step_parts",
    "memory_format",
    "device",
    "files",
    "machine",
    "streams",
    "console",
    "config",
    "reference",
    "chunked",
    "kernels",
    "ops",
    "processes",
    "losses",
    "models",
    "data",
    "methods",
    "runs",
    "engine",
    "planning",
    "analysis",
    "sweep",
    "cli",
)
# Read by any room: the version, in the package itself.
PACKAGE_NAMES = {"__version__"}


def imported_modules(file: Path) -> set[str]:
    """Modules of the package, such as `ops.registry`, and names imported from them."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.removeprefix("prcl_fast.") for name in names if name.startswith("prcl_fast.")}


def files_of(room: str) -> list[Path]:
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_before_it(room: str) -> None:
    below = set(ROOMS[: ROOMS.index(room) + 1]) | PACKAGE_NAMES
    files = files_of(room)
    assert files
    for file in files:
        wrong = {name.split(".")[0] for name in imported_modules(file)} - below
        assert not wrong, f"{file.relative_to(PACKAGE)} imports {sorted(wrong)}"


def test_no_modules_of_a_room_import_each_other_in_a_circle() -> None:
    modules = {
        ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file
        for room in ROOMS
        for file in files_of(room)
    }
    arrows = {
        name: {
            module
            for imported in imported_modules(file)
            for module in (imported, imported.rpartition(".")[0])
            if module in modules and module != name and not name.startswith(f"{module}.")
        }
        for name, file in modules.items()
    }
    while arrows:  # takes away the modules that import none of those left, from the ground up
        free = {name for name, found in arrows.items() if not found & arrows.keys()}
        assert free, f"in circles, or above one: {sorted(arrows)}"
        arrows = {name: found for name, found in arrows.items() if name not in free}


def test_every_room_has_its_place_in_the_law() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert found - {"__pycache__", "__init__"} == set(ROOMS)


def test_benchmarks_import_no_command() -> None:
    for file in sorted((PACKAGE.parent / "bench").rglob("*.py")):
        assert not {name for name in imported_modules(file) if name.split(".")[0] == "cli"}, file
