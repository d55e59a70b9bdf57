"""JSON text of results."""

from __future__ import annotations

import json
import math

from prcl_fast.files.json_text import json_text


def test_numbers_that_are_not_finite_become_null_at_any_depth() -> None:
    tree = {"a": math.nan, "b": [1.5, (math.inf, {"c": -math.inf})], "d": "NaN", "e": None, "f": True}
    expected = {"a": None, "b": [1.5, [None, {"c": None}]], "d": "NaN", "e": None, "f": True}
    assert json.loads(json_text(tree)) == expected
    assert "NaN" not in json_text({"a": math.nan}, indent=1)
