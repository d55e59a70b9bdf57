"""Text for people: names with escaped control characters, values that differ, durations."""

from __future__ import annotations

import json
import os
import re

# C0, C1, line and paragraph separators, marks that change the direction, and halves of surrogate pairs.
_ESCAPED = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


_SHOWN = 120  # characters of a long value in a message
_BEFORE = 20  # of them before the first character that differs


def printable(text: str) -> str:
    """The text with each character that would end its line or control the terminal as Python's escape."""
    return _ESCAPED.sub(lambda found: repr(found[0])[1:-1], text)


def value_text(value: object) -> str:
    """A value that JSON can hold, in one line; a text without quotation marks, unless it is empty."""
    return printable(value if isinstance(value, str) else json.dumps(value)) or "''"


def excerpts(text: str, other: str) -> tuple[str, str]:
    """Two texts that differ, cut to the part around their first difference where one is long."""
    if max(len(text), len(other)) <= _SHOWN:
        return text, other
    alike = len(os.path.commonprefix([text, other]))
    start = max(0, alike - _BEFORE)

    def cut(whole: str) -> str:
        end = start + _SHOWN
        return f"{'...' if start else ''}{whole[start:end]}{'...' if len(whole) > end else ''}"

    return cut(text), cut(other)


def duration(seconds: float) -> str:
    """A duration in the unit that suits it, such as 312 ms, 48.2 s, 4.5 min, 3 h 20 min or 2.5 days."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{seconds / 60:.3g} min"
    hours = round(seconds / 3600)
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours / 24:.1f} days"
