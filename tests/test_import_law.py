"""Imports point in one direction: DESIGN's law, read off the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "prcl_fast"

# What each part may import besides itself, and besides the leaves, which know nobody.
ALLOWED = {
    "reference": set(),
    "kernels": {"reference"},
    "ops": {"reference", "kernels"},
    "losses": {"ops", "reference"},
    "models": {"ops"},
    "data": set(),
    "methods": {"losses", "ops", "models", "data"},
    "analysis": {"methods", "models", "data", "ops", "losses", "engine"},
    "engine": {"methods", "losses", "ops", "models", "data"},
    "cli": {"engine", "analysis", "methods", "models", "data", "ops", "losses"},
}
LEAVES = {
    "config",
    "config_contrast",
    "config_methods",
    "config_types",
    "sweep_config",
    "distributed",
    "regular_file",
    "torch_file",
    "config_files",
    "config_errors",
    "errors",
    "device",
    "memory",
    "memory_format",
    "parts",
    "__version__",
}


def imported_parts(file: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        parts |= {name.split(".")[1] for name in names if name.startswith("prcl_fast.")}
    return parts


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_a_part_imports_only_what_lies_below_it(part: str) -> None:
    files = sorted((PACKAGE / part).glob("**/*.py"))
    assert files
    for file in files:
        wrong = imported_parts(file) - ALLOWED[part] - LEAVES - {part}
        assert not wrong, f"{file.relative_to(PACKAGE)} imports {sorted(wrong)}"


def test_the_leaves_import_no_part() -> None:
    for file in PACKAGE.glob("*.py"):
        assert imported_parts(file) <= LEAVES, file.name


def test_every_part_has_its_place_in_the_law() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(
        ALLOWED
    )
