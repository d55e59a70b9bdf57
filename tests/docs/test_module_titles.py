"""First docstring lines: noun or verb first, no question word."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from support.paths import ROOT

MODULES = ("prcl_fast", "bench", "tests", "docs", "examples")
ALL = ("prcl_fast", "bench", "examples")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings() -> Iterator[tuple[str, str]]:
    """Place and first line: of modules in the folders `MODULES`, of classes and functions in `ALL`."""
    for folder in MODULES:
        for file in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(file.read_text())
            for node in ast.walk(tree) if folder in ALL else [tree]:
                if isinstance(node, DOCUMENTED):
                    line = node.body[0].lineno if node.body else 1
                    first = (ast.get_docstring(node) or "").partition("\n")[0]
                    yield f"{file.relative_to(ROOT).as_posix()}:{line}", first


def test_no_docstring_begins_with_a_question_word() -> None:
    wrong = {
        x: first for x, first in docstrings() if re.match(r"(What|How|Who|Whose|Where|Which|Why)\b", first)
    }
    assert wrong == {}, "\n".join(f"{place}: {first}" for place, first in wrong.items())
