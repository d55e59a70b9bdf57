"""Where things lie that all runs of a user share."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """`prcl_fast` in $XDG_CACHE_HOME, or in ~/.cache; it may not be there yet."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "prcl_fast"
