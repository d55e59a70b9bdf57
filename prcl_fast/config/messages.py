"""Messages of validation errors: one line that names the key as the user wrote it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from prcl_fast.config.renamed import new_name
from prcl_fast.config.types import PATH_ERROR

_SHOWN = 160
# Names that other programs have for keys of this one.
USUAL_NAMES = {
    **dict.fromkeys(
        ("epochs", "max_epochs", "num_epochs", "steps", "max_iters", "iters"), "train.iterations"
    ),
    **dict.fromkeys(("learning_rate", "base_lr"), "optim.lr"),
    **dict.fromkeys(("batch_size", "batch"), "train.batch_labeled"),
    **dict.fromkeys(("num_workers", "n_workers"), "data.workers"),
    **dict.fromkeys(("pretrained", "checkpoint", "ckpt"), "model.weights"),
    **dict.fromkeys(("crop_size", "image_size", "img_size"), "data.crop"),
    "ignore_index": "data.ignore",
    "out_dir": "output",
}


def first_message(error: ValidationError, tree: Mapping[str, Any], root: type[BaseModel]) -> str:
    """One line about the first error, and the number of further ones; unknown keys come first, then paths.

    An unknown key often causes the other errors, such as a required key that is missing. A key that may hold
    a list or a path has an error for the list, too.
    """
    order = ("extra_forbidden", PATH_ERROR)
    mistakes = sorted(error.errors(), key=lambda m: (*order, m["type"]).index(m["type"]))
    mistake = mistakes[0]
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    location = _location(mistake["loc"], tree)
    if mistake["type"] == "invalid_key":
        section = ".".join(_location(mistake["loc"][:-1], tree))
        return f"{section + ': ' if section else ''}key {shortened(mistake['input'])} is not a name{more}"
    if mistake["type"] == "missing":
        location.append(str(mistake["loc"][-1]))
    where = _cut(".".join(location))
    if mistake["type"] == "extra_forbidden":
        known = _known_keys(mistake["loc"][:-1], root)
        renamed = new_name(location, known)
        if renamed is not None:
            return f"key {where} is now named {renamed}{more}"
        return f"unknown key {where}; {_hint(location, known, root)}{more}"
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "value_error":
        return f"{where + '.' if where else ''}{message}{more}"
    if mistake["type"] == "union_tag_not_found":
        return f"{where}.name: a method's name is required{more}"
    if mistake["type"] == "union_tag_invalid":
        tags = mistake["ctx"]["expected_tags"].replace("'", "")
        return f"{where}.name: unknown method {shortened(mistake['ctx']['tag'])}; known: {tags}{more}"
    if mistake["type"] == "missing":
        return f"{where}: this key is required{more}"
    if mistake["type"] in ("model_type", "dict_type"):
        message = "a section of keys is expected"
    elif mistake["type"] == "list_type" and isinstance(mistake["input"], (bool, int, float, str)):
        example = [mistake["input"]] * _least_length(mistake["loc"], root)
        message = f"{message}, such as {shortened(example)}"
    return f"{where}: {message[0].lower()}{message[1:]}, got {shortened(mistake['input'])}{more}"


def _hint(location: Sequence[str], known: Sequence[str], root: type[BaseModel]) -> str:
    """The meaning of an unknown key: the same or a usual name elsewhere, or a similar or any one here."""
    name, where = location[-1], ".".join(location)
    elsewhere = [key for key in leaves(root) if key.rpartition(".")[2] == name and key != where]
    if not elsewhere and name in USUAL_NAMES:
        elsewhere = [USUAL_NAMES[name]]
    if elsewhere:
        return f"did you mean {' or '.join(dict.fromkeys(elsewhere))}?"
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {nearest[0]}?" if nearest else f"known here: {', '.join(known)}"


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The full names of all keys of a section that are no sections themselves; a method's once a method."""
    for name, field in section.model_fields.items():
        sections = [m for m in (field.annotation, *_members(field.annotation)) if _is_section(m)]
        for below in sections:
            yield from leaves(below, f"{prefix}{name}.")
        if not sections:
            yield prefix + name


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _least_length(loc: Sequence[int | str], root: type[BaseModel]) -> int:
    """The least length of the list at a pydantic location; 1 where it is not known."""
    kind: Any = _section(loc[:-1], root)
    field = kind.model_fields.get(loc[-1]) if _is_section(kind) else None
    if field is None:
        return 1
    found = [*field.metadata]
    for member in get_args(field.annotation):  # of `Size | None`
        for entry in getattr(member, "__metadata__", ()):
            found += entry.metadata if isinstance(entry, FieldInfo) else [entry]
    return max((entry.min_length for entry in found if hasattr(entry, "min_length")), default=1)


def shortened(value: object) -> str:
    """`repr(value)` in one line, shortened to 160 characters."""
    return _cut(" ".join(repr(value).split()))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _location(loc: Sequence[int | str], tree: Mapping[str, Any]) -> list[str]:
    """The key path as the user wrote it, without the tags that pydantic adds for members of a union."""
    location: list[str] = []
    node: Any = tree
    for part in loc:
        if isinstance(node, Mapping):
            inside = part in node
        elif isinstance(node, list):
            inside = isinstance(part, int) and part < len(node)
        else:
            inside = False
        if inside:
            node = node[part]  # type: ignore[index]
            location.append(str(part))
    return location


def _known_keys(loc: Sequence[int | str], root: type[BaseModel]) -> list[str]:
    """The field names of the section at a pydantic location."""
    kind = _section(loc, root)
    return list(kind.model_fields) if _is_section(kind) and not _members(kind) else []


def _section(loc: Sequence[int | str], root: type[BaseModel]) -> Any:
    """The type at a pydantic location, which names union members by tag or type."""
    kind: Any = root
    for part in loc:
        if isinstance(kind, type) and issubclass(kind, BaseModel) and part in kind.model_fields:
            kind = kind.model_fields[str(part)].annotation
            continue
        members = _members(kind)
        tagged = (
            [m for m in members if part in get_args(m.model_fields["name"].annotation)] if members else []
        )
        kind = tagged[0] if tagged else kind
    return kind


def _members(kind: Any) -> list[Any]:
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, UnionType):
        return [m for m in get_args(kind) if isinstance(m, type) and "name" in getattr(m, "model_fields", {})]
    return []
