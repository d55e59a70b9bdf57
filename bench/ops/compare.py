"""Comparison of two results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.ops.run import KEY, label
from prcl_fast.errors import InputError


@dataclass(frozen=True)
class Pair:
    """A row of both results; `after` is None if it no longer runs."""

    name: str
    before: float
    after: float | None

    @property
    def ratio(self) -> float:
        return float("inf") if self.after is None else self.after / self.before


def pairs(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Pair]:
    """Rows with the same identity, in the order of `before`. Rows that `after` lacks are left out.

    Raises:
        InputError: there are none.
    """
    later = {_key(row): row["ms"] for row in after["rows"]}
    found = [
        Pair(_name(row), row["ms"], later[_key(row)])
        for row in before["rows"]
        if row["ms"] is not None and _key(row) in later
    ]
    if not found:
        raise InputError("compare: the two results have no op, size, dtype and candidate in common")
    return found


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Differences between the two machines."""
    names = ("device", "driver", "threads", "torch", "triton")
    return [
        f"{name}: {before['machine'][name]} and {after['machine'][name]}"
        for name in names
        if before["machine"][name] != after["machine"][name]
    ]


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def _name(row: Mapping[str, Any]) -> str:
    parts = [label(row), row["size"], row["dtype"], row["labels"], row["direction"], row["candidate"]]
    return " ".join(parts)
