"""The page of all settings, docs/settings.md: every YAML key with type, range, default and meaning."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_HEAD = """\
# Settings

Every key of a configuration file. This page is generated from the schema in `prcl_fast/config`: run
`make schema` after a change there. `configs/schema.json` is the same schema for editors, which then complete
and check keys as you type.

- `base: FILE` inherits from another file; the keys below it replace the inherited ones.
- Unknown keys are errors, and values are never converted silently.
- On the command line `key.path=value` replaces a value: `prcl train mine.yaml train.iterations=2000`.
- Relative paths in `data` and `model` are relative to the file in which they are written; `output`,
  `method.prototypes_from` and paths on the command line are relative to the working directory.
- "Required" keys may come from a base file.
"""
_ROW = "| {} | {} | {} | {} |"
_WITHOUT_DEFAULT = {"base": "none"}


def settings_page(schema: Mapping[str, Any]) -> str:
    """The page in Markdown, of the JSON schema of a configuration."""
    definitions = schema["$defs"]
    lines = [_HEAD]
    sections = {key for key, value in schema["properties"].items() if key == "method" or _section(value)}
    top = {key: value for key, value in schema["properties"].items() if key not in sections}
    lines += _table("Top level", "", "", top)
    for key, value in schema["properties"].items():
        reference = _section(value)
        if key == "method":
            for choice in value["oneOf"]:
                definition = _definition(definitions, _section(choice))
                keys = {"name": definition["properties"]["name"], **definition["properties"]}
                lines += _table(
                    f"method: {keys['name']['const']}", definition["description"], "method.", keys
                )
        elif reference:
            lines += _sections(definitions, reference, key)
    return "\n".join(lines).rstrip() + "\n"


def _sections(definitions: Mapping[str, Any], reference: str, path: str) -> Iterator[str]:
    """The table of a section, then those of the sections in it."""
    definition = _definition(definitions, reference)
    inner = {key: value for key, value in definition["properties"].items() if _section(value)}
    plain = {key: value for key, value in definition["properties"].items() if key not in inner}
    yield from _table(path, definition["description"], f"{path}.", plain)
    for key, value in inner.items():
        yield from _sections(definitions, _section(value), f"{path}.{key}")


def _table(title: str, about: str, prefix: str, properties: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {title}\n"
    if about:
        yield f"{_one_line(about.split(chr(10) * 2)[0])}\n"
    yield _ROW.format("key", "type", "default", "meaning")
    yield "|---|---|---|---|"
    for key, value in properties.items():
        default = (
            f"`{_value(value['default'])}`" if "default" in value else _WITHOUT_DEFAULT.get(key, "required")
        )
        meaning = value.get("description", "The method." if "const" in value else "")
        yield _ROW.format(f"`{prefix}{key}`", _type(value), default, _one_line(meaning).replace("|", "\\|"))
    yield ""


def _type(value: Mapping[str, Any]) -> str:
    """Type and range in words, such as "integer, at least 1"."""
    if "anyOf" in value:
        choices = [_type(choice) for choice in value["anyOf"]]
        return (", or " if any("," in choice for choice in choices) else " or ").join(choices)
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    kind = value["type"]
    if kind == "array":
        least, most = value.get("minItems"), value.get("maxItems")
        count = f"{least} " if least == most is not None else ""
        item, _, bounds = _type(value["items"]).partition(", ")
        word, space, rest = item.partition(" ")
        each = f", each {bounds.removeprefix('each ')}" if bounds else ""
        return f"list of {count}{word}s{space}{rest}{each}"
    if kind == "object":
        return "map of ids"
    names = {"boolean": "true or false", "null": "null", "string": "path" if "format" in value else "text"}
    return names.get(kind, f"{kind}{_range(value)}")


def _range(value: Mapping[str, Any]) -> str:
    low, high = value.get("minimum"), value.get("maximum")
    above, below = value.get("exclusiveMinimum"), value.get("exclusiveMaximum")
    if low is not None and high is not None and above is None:
        return f", {low:g} to {high:g}"
    low = low if above is None else None
    bounds = (("above", above), ("at least", low), ("at most", high), ("below", below))
    return "".join(f", {word} {bound:g}" for word, bound in bounds if bound is not None)


def _value(default: Any) -> str:
    if isinstance(default, list):
        return f"[{', '.join(map(_value, default))}]"
    if isinstance(default, float):
        return f"{default:.4g}"
    return default if isinstance(default, str) else json.dumps(default)


def _section(value: Mapping[str, Any]) -> str:
    """The reference of a section's definition; "" for a plain key."""
    return str(value.get("$ref", ""))


def _definition(definitions: Mapping[str, Any], reference: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = definitions[reference.rpartition("/")[2]]
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())
