"""Line numbers of the definitions that the pages cite: `python docs/lines.py` corrects them.

A citation is a qualified name and a place: `Trainer.step` `prcl_fast/engine/trainer.py:169`.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CITATION = re.compile(r"`([\w.]+)`( |\n| \| )`([\w/]+\.py):(\d+)`")


def definitions(file: Path) -> dict[str, int]:
    """The line of each function, class and method of a module, by qualified name."""
    found: dict[str, int] = {}

    def visit(body: list[ast.stmt], above: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[above + node.name] = node.lineno
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{above}{node.name}.")

    visit(ast.parse(file.read_text()).body, "")
    return found


def corrected(text: str) -> str:
    """`text` with the present line number in each citation.

    Raises:
        ValueError: a cited file is not there, or does not define the name.
    """

    def correct(citation: re.Match[str]) -> str:
        name, between, path, _ = citation.groups()
        if not (ROOT / path).is_file():
            raise ValueError(f"{path}: no such file; cited for {name}")
        line = definitions(ROOT / path).get(name)
        if line is None:
            raise ValueError(f"{path}: defines no {name}")
        return f"`{name}`{between}`{path}:{line}`"

    return CITATION.sub(correct, text)


if __name__ == "__main__":
    for page in sorted((ROOT / "docs").glob("*.md")):
        page.write_text(corrected(page.read_text()))
