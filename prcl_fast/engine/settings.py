"""The settings of a run as a flat table, to say in what two runs differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prcl_fast.config import NEUTRAL_KEYS, Config, dump_config


def settings(config: Config) -> dict[str, Any]:
    """key.path: value, paths absolute, for all that shapes the run's result."""
    flat: dict[str, Any] = {}

    def walk(tree: Mapping[str, Any], above: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict) and key != "label_map":
                walk(value, f"{above}{key}.")
            elif above + key not in NEUTRAL_KEYS:
                flat[above + key] = value

    walk(dump_config(config), "")
    return flat


def first_difference(former: Config, now: Config) -> str:
    """The first setting in which two configurations differ, in words; "" where all are the same."""
    there, here = settings(former), settings(now)
    for key in [*here, *there]:
        if there.get(key) != here.get(key):
            return f"{key} is {there.get(key, 'not set')} there and {here.get(key, 'not set')} here"
    return ""
