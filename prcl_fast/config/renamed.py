"""Renamed keys of a configuration: refused in a user's file, translated in the files of a run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

# From old to new name, each with its section; the section stays the same.
RENAMED = {"method.share": "method.anchors_per_set"}


def new_name(key: Sequence[str], known: Collection[str]) -> str | None:
    """The new name of an unknown key, if it is the old name of one of the `known` keys of its section."""
    for old, new in RENAMED.items():
        name = new.rpartition(".")[2]
        if old.split(".")[-len(key) :] == list(key) and name in known:
            return name
    return None


def with_new_names(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that a former version has stored, with today's names of its keys."""
    translated = dict(tree)
    for old, new in RENAMED.items():
        section, _, key = old.partition(".")
        holder = translated.get(section)
        if isinstance(holder, Mapping) and key in holder:
            name = new.partition(".")[2]
            translated[section] = {name if given == key else given: value for given, value in holder.items()}
    return translated
