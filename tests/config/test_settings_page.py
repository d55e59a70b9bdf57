"""docs/settings.md: every key of the schema, with type, default and meaning."""

from __future__ import annotations

import re

from prcl_fast.config import json_schema
from prcl_fast.config.settings_page import settings_page
from support.paths import ROOT

ROW = re.compile(r"^\| `([\w.]+)` \| (.+?) \| (.+?) \| (.*) \|$", re.MULTILINE)


def rows() -> list[tuple[str, str, str, str]]:
    return ROW.findall(settings_page(json_schema()))


def test_the_page_is_current() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == settings_page(json_schema()), "run `make schema`"


def test_every_key_of_the_schema_has_a_row() -> None:
    schema = json_schema()
    keys = [key for definition in schema["$defs"].values() for key in definition["properties"]]
    # The top level's own keys; its sections are definitions.
    keys += [key for key, value in schema["properties"].items() if "$ref" not in value and key != "method"]
    sections = [key for key in keys if key in ("synthetic", "augment")]
    shown = [key.rpartition(".")[2] for key, *_ in rows()]
    assert sorted(shown) == sorted(key for key in keys if key not in sections)


def test_every_key_has_a_meaning() -> None:
    assert [key for key, _, _, meaning in rows() if not meaning.strip()] == []


def test_ranges_and_defaults_are_written_in_words() -> None:
    found = {key: (kind, default) for key, kind, default, _ in rows()}
    assert found["data.crop"] == ("list of 2 integers, each 1 to 16384", "`[512, 512]`")
    assert found["data.palette"] == ("list of lists of 3 integers, each 0 to 255, or null", "`null`")
    assert found["optim.lr"] == ("number, above 0", "`0.0064`")
    assert found["eval.stride"] == ("number, above 0, at most 1", "`0.6667`")
    assert found["output"] == ("path", "required")
    assert found["train.amp"] == ("`off`, `bf16`, `fp16`", "`off`")
