"""The first docstring line of a module is a noun phrase that names the thing."""

from __future__ import annotations

import ast
import re

from support.paths import ROOT

FOLDERS = ("prcl_fast", "bench", "tests", "docs", "examples")


def test_no_title_begins_with_a_question_word() -> None:
    riddles = {}
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            title = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]
            if re.match(r"(What|How|Who|Where|Which|Whose)\b", title):
                riddles[file.relative_to(ROOT).as_posix()] = title
    assert riddles == {}, "\n".join(f"{file}: {title}" for file, title in riddles.items())
