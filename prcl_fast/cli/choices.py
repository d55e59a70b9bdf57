"""Names given on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from prcl_fast.errors import InputError


def check_known(key: str, values: Collection[str], known: Collection[str]) -> None:
    """Raises InputError, which names `key` and the nearest known name, for a value that is not known."""
    for value in values:
        if value not in known:
            near = difflib.get_close_matches(value, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"{key}: {value!r} is not one of {', '.join(known)}{hint}")
