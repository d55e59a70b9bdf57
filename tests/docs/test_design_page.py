"""docs/design.md: the picture of the rooms, their table, and the cited lines are those of the source."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from support.paths import ROOT

DESIGN = ROOT / "docs" / "design.md"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_shows_the_imports() -> None:
    rooms = script("rooms")
    with Image.open(rooms.PICTURE) as picture:
        shown = json.loads(picture.text[rooms.FIELD])
    assert shown == rooms.arcs(), "run `python docs/rooms.py`"
    assert list(shown) == list(rooms.ordered_rooms())


def test_arcs_lead_down_and_leave_no_room_alone() -> None:
    rooms = script("rooms")
    order, arcs = rooms.ordered_rooms(), rooms.arcs()
    assert all(order.index(below) < order.index(room) for room in order for below in arcs[room])
    assert {"engine", "methods"} <= set(order)
    assert all(any(room in below for below in arcs.values()) for room in order if room != "cli")


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    script("rooms").draw(tmp_path / "rooms.png")
    with Image.open(tmp_path / "rooms.png") as picture:
        assert min(picture.size) > 300


def test_the_table_lists_the_rooms_in_order() -> None:
    table = DESIGN.read_text().partition("| room, from the top |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(
        reversed(script("rooms").ordered_rooms())
    )


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_cited_lines_define_the_cited_names(page: Path) -> None:
    assert page.read_text() == script("lines").corrected(page.read_text()), "run `python docs/lines.py`"


def test_the_life_of_a_step_cites_its_definitions() -> None:
    citations = script("lines").CITATION.findall(DESIGN.read_text())
    assert len(citations) >= 15
    assert {"TrainStep.__call__", "PRCL.losses"} <= {name for name, *_ in citations}


def test_a_citation_of_what_is_not_there_is_an_error() -> None:
    correct = script("lines").corrected
    assert correct("`TrainStep` `prcl_fast/engine/step.py:1`") != "`TrainStep` `prcl_fast/engine/step.py:1`"
    with pytest.raises(ValueError, match="defines no Gone"):
        correct("`Gone` `prcl_fast/engine/step.py:1`")
    with pytest.raises(ValueError, match="no such file"):
        correct("`TrainStep` `prcl_fast/engine/gone.py:1`")
