"""Shell completion of keys, values and choices, from the bundled JSON schema alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

# As `config.bundled.bundled_folder`, without the imports of the configuration.
_PACKAGE = Path(__file__).resolve().parents[1]
_PLACES = (_PACKAGE / "configs" / "schema.json", _PACKAGE.parent / "configs" / "schema.json")


def one_of(*choices: str) -> Callable[[str], list[str]]:
    """Completes to one of `choices`."""
    return lambda incomplete: [choice for choice in choices if choice.startswith(incomplete)]


def complete_override(context: typer.Context, incomplete: str) -> list[str]:
    """Completes `key.path=value`: the keys of the schema; of a single key also its known values.

    Nothing is found for a word that begins no key, so that the shell completes it to a file.
    """
    values = _values()
    # bash makes three words of key=value.
    before = [word for words in context.params.values() if isinstance(words, (list, tuple)) for word in words]
    if incomplete == "" and before and before[-1] in values:  # the word is "="
        return list(values[before[-1]])
    if before[-1:] == ["="] and len(before) > 1:
        return [choice for choice in values.get(before[-2], ()) if choice.startswith(incomplete)]
    path, given, value = incomplete.partition("=")
    if given:
        return [f"{path}={choice}" for choice in values.get(path, ()) if choice.startswith(value)]
    keys = [key for key in values if key.startswith(path)] if path else []
    if len(keys) > 1:
        return [f"{key}=" for key in keys]
    return [f"{key}={choice}" for key in keys for choice in ("", *values[key])]


def _values() -> dict[str, tuple[str, ...]]:
    """The key paths of a configuration, each with its known values: choices, or the default."""
    for place in _PLACES:
        if place.is_file():
            schema = json.loads(place.read_text(encoding="utf-8"))
            found: dict[str, tuple[str, ...]] = {}
            for key, values in _leaves(schema, schema, ""):
                found[key] = tuple(dict.fromkeys((*found.get(key, ()), *values)))
            return found
    return {}


def _leaves(node: dict[str, Any], schema: dict[str, Any], path: str) -> Iterator[tuple[str, list[str]]]:
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    branches = node.get("oneOf", []) + node.get("anyOf", [])
    sections = [branch for branch in [node, *branches] if "properties" in branch or "$ref" in branch]
    if not sections and path:
        yield path, _known(node, branches)
    for section in sections:
        if section is not node:
            yield from _leaves(section, schema, path)
            continue
        for name, child in section["properties"].items():
            yield from _leaves(child, schema, f"{path}.{name}" if path else name)


def _known(node: dict[str, Any], branches: list[dict[str, Any]]) -> list[str]:
    choices: list[Any] = []
    for option in (node, *branches):
        choices += option.get("enum", [])
        choices += [option["const"]] if "const" in option else []
        choices += [True, False] if option.get("type") == "boolean" else []
        choices += [None] if option.get("type") == "null" else []
    if not choices and isinstance(node.get("default"), (str, int, float)):
        choices = [node["default"]]
    return [choice if isinstance(choice, str) else json.dumps(choice) for choice in choices]
