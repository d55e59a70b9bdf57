"""Configuration files as plain trees: YAML, `base:` inheritance, overrides; the schema is not known here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from prcl_fast.errors import InputError

# The keys whose values are paths, relative to the file in which they stand.
PATH_KEYS = (
    ("data", "root"),
    ("data", "labeled"),
    ("data", "unlabeled"),
    ("data", "val"),
    ("data", "classes"),
    ("data", "cache_dir"),
    ("model", "weights"),
)


def read_tree(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The tree of a YAML file merged over its chain of `base:` files; `above` are those that inherit from it.

    Raises:
        InputError: naming the file.
    """
    resolved = path.resolve()
    if resolved in above:
        raise InputError(f"{path}: base: the files inherit from each other in a circle")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {_one_line(error)}") from None
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected keys and values at the top level")
    base = tree.pop("base", None)
    _anchor_paths(tree, path.parent)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise InputError(f"{path}: base: expected the name of a file")
    return _merge(read_tree(path.parent / base, (*above, resolved)), tree)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number, as every other language has it, and a repeated key is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} stands twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [*resolvers] for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _anchor_paths(tree: dict[str, Any], folder: Path) -> None:
    for section, key in PATH_KEYS:
        holder = tree.get(section)
        if isinstance(holder, dict) and isinstance(holder.get(key), str):
            holder[key] = str(folder / holder[key])


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        # Another kind of method or data set starts anew: keys of the former kind would be unknown to it.
        switches = isinstance(value, dict) and isinstance(below, dict) and _switches(key, below, value)
        if isinstance(value, dict) and isinstance(below, dict) and not switches and key != "label_map":
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged


def _switches(key: str, below: dict[str, Any], value: dict[str, Any]) -> bool:
    return key == "method" and "name" in value and value["name"] != below.get("name", value["name"])


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Puts one `key.path=value` into `tree`; the value is YAML. Raises InputError."""
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise InputError(f"override {override!r}: expected key.path=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise InputError(f"override {override!r}: the value is not valid YAML") from None
    holder = tree
    for key in keys[:-1]:
        below = holder.setdefault(key, {})
        if not isinstance(below, dict):
            raise InputError(f"override {override!r}: {key} is a value, not a section")
        holder = below
    if keys == ["method", "name"] and holder.get("name", value) != value:
        holder.clear()  # another method starts anew: the former one's keys would be unknown to it
    holder[keys[-1]] = value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
