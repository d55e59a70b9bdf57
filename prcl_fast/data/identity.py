"""The identity of a data set: equal wherever the same classes, lists, images and labels lie.

Processes of one run must have one identity, and a run goes on only with the data that it began with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from prcl_fast.console.text import excerpts
from prcl_fast.data.source import SUBSETS, Source

_WHOLE = 16  # images of a subset whose bytes are read, evenly spaced over its list


def data_identity(source: Source) -> dict[str, str]:
    """The parts of a data set on which results depend, each a short text by the name that a message gives it.

    Every image counts with the signs of `Source.content`, and 16 of a subset with all their bytes: a data set
    that was copied keeps its identity, and to find it takes one `stat` a file.

    Raises:
        InputError: a file cannot be read; the message names it.
    """
    found = {"data.classes": ", ".join(source.classes)}
    for subset in SUBSETS:
        split = source.splits[subset]
        found[f"data.{subset}"] = f"{len(split.names)} images, list {split.fingerprint}"
        found[f"files of data.{subset}"] = _content(source, split.names, labeled=subset != "unlabeled")
    return found


def changed_data(former: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The first part in which two identities differ, in words; "" where all are equal."""
    for part in [*now, *former]:
        there, here = former.get(part, "nothing"), now.get(part, "nothing")
        if there != here:
            there, here = excerpts(there, here)
            return f"{part}: {there} there, {here} here"
    return ""


def _content(source: Source, names: Sequence[str], *, labeled: bool) -> str:
    whole = set(range(0, len(names), -(-len(names) // _WHOLE) or 1))
    digest = hashlib.sha256()
    for position, name in enumerate(names):
        digest.update(f"{name} {source.content(name, labeled, whole=position in whole)}\n".encode())
    return f"content {digest.hexdigest()[:12]}"
