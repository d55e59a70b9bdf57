"""Configuration files as plain trees: YAML, `base:` inheritance, overrides. Independent of the schema."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from prcl_fast.config.bundled import find_config
from prcl_fast.config.messages import shortened
from prcl_fast.console import note
from prcl_fast.errors import InputError
from prcl_fast.files.reading import read_text

MAX_BYTES = 2**20
MAX_DEPTH = 20
MAX_NODES = 10_000  # a palette and a label map of 256 entries have about 2,000 together

# C0, C1, line and paragraph separators, and halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

# Keys of paths that are relative to the file that contains them.
PATH_KEYS = (
    ("data", "root"),
    ("data", "labeled"),
    ("data", "unlabeled"),
    ("data", "val"),
    ("data", "classes"),
    ("data", "cache_dir"),
    ("model", "weights"),
)
# Keys of run folders, relative to the working directory, as `output` is.
RUN_KEYS = (("method", "prototypes_from"),)


def say_on_stderr(line: str) -> None:
    """Prints a line for the user beside the command's own output."""
    note(f"prcl: {line}")


def read_tree(
    path: Path, say: Callable[[str], None] | None = say_on_stderr, written: Path | None = None
) -> dict[str, Any]:
    """The tree of a YAML file, merged over its chain of `base:` files.

    A file that does not exist, but is bundled, is read from the package as if it lay at `path`.

    Args:
        say: takes a line that names the bundled file; None: already reported.
        written: the path as the user wrote it; None: `path`.

    Raises:
        InputError: naming the file.
    """
    return _read(path, written or path, (), say)


def _read(
    path: Path, written: Path, above: tuple[Path, ...], say: Callable[[str], None] | None
) -> dict[str, Any]:
    """`above` are the files that inherit from this one."""
    resolved = Path(os.path.realpath(path))
    if resolved in above:
        raise InputError(f"{path}: base: the files inherit from each other in a circle")
    if len(above) > MAX_DEPTH:
        raise InputError(f"{path}: base: more than {MAX_DEPTH} files inherit from each other")
    found = find_config(path, written)
    bundled = found != path
    if bundled and say is not None:
        say(f"{path}: no such file here; reading the bundled {found}")
        say = None  # the files below it are bundled as well
    text = read_text(found, "configuration file", MAX_BYTES)
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
    below = Path(anchored(base, path.parent))
    base_written = written.parent / base if bundled else Path(base)
    return _merge(_read(below, base_written, (*above, resolved), say), tree)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number and a repeated key is an error.

    Its trees are bounded: depth, number of nodes with all aliases expanded, numbers of 64 bits, texts of one
    line. Every refusal is a yaml.YAMLError.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._nodes = 0
        self._nodes_of: dict[int, int] = {}  # by the identity of a node, once it is complete

    def compose_node(self, parent: Any, index: Any) -> Any:
        is_alias = self.check_event(yaml.AliasEvent)
        mark = self.peek_event().start_mark
        before = self._nodes
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested more than {MAX_DEPTH} deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and id(node) not in self._nodes_of:
            raise yaml.composer.ComposerError(None, None, "an alias to what it is part of", mark)
        self._nodes += self._nodes_of[id(node)] if is_alias else 1
        if self._nodes > MAX_NODES:
            raise yaml.composer.ComposerError(
                None, None, f"more than {MAX_NODES} keys and values, aliases written out", mark
            )
        if not is_alias:
            self._nodes_of[id(node)] = self._nodes - before
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be one word or number", key_node.start_mark
                )
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {shortened(key_node.value)} is duplicated", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep=deep)
        except yaml.YAMLError:
            raise
        # Text that does not fit its tag raises a different exception for each tag.
        except Exception:
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{shortened(node.value)} cannot be read as {kind}", node.start_mark
            ) from None
        if isinstance(value, str) and _UNPRINTABLE.search(value):
            raise yaml.constructor.ConstructorError(
                None, None, f"{shortened(value)} holds a line break or control character", node.start_mark
            )
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise yaml.constructor.ConstructorError(
                None, None, f"{shortened(node.value)} is beyond 64 bits", node.start_mark
            )
        return value


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
            holder[key] = anchored(holder[key], folder)


def anchored(value: str, folder: Path) -> str:
    """The path `value` relative to `folder`; ~ is the home folder.

    A bundled file may be read as if it lay in a folder that does not exist: then `..` is taken by name.
    """
    path = folder / os.path.expanduser(value)
    return str(path) if folder.is_dir() else os.path.normpath(path)


def plain_path(path: Path) -> Path:
    """The path made absolute and free of `..`, so that each place has one spelling.

    Symbolic links stay, except before a `..`, which leads to the parent of the link's target.
    """
    root, *parts = path.absolute().parts
    plain = Path(root)
    for part in parts:
        if part == os.pardir:
            plain = (plain.resolve() if plain.is_symlink() else plain).parent
        else:
            plain /= part
    return plain


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        # Another method starts anew: the old keys may be invalid for it.
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
    where = f"override {shortened(override)}"
    if not separator or not all(path.strip().split(".")):
        raise InputError(f"{where}: expected key.path=value")
    if len(text) > MAX_BYTES:
        raise InputError(f"{where}: too long")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise InputError(f"{where}: the value is not valid YAML") from None
    set_value(tree, path, value, where)


def set_value(tree: dict[str, Any], path: str, value: Any, where: str) -> None:
    """Puts a value at `key.path` into `tree`. Raises InputError that begins with `where`."""
    keys = path.strip().split(".")
    if not all(keys):
        raise InputError(f"{where}: an empty part in the key {shortened(path)}")
    if len(keys) > MAX_DEPTH:
        raise InputError(f"{where}: too long")
    holder = tree
    for key in keys[:-1]:
        below = holder.setdefault(key, {})
        if not isinstance(below, dict):
            raise InputError(f"{where}: {key} is a value, not a section")
        holder = below
    if keys == ["method", "name"] and holder.get("name", value) != value:
        holder.clear()  # another method starts anew: the old keys may be invalid for it
    holder[keys[-1]] = value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).replace('in "<unicode string>", ', "at ")
