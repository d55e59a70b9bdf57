"""Sweep files: the runs of one table, as the product of named axes and seeds."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError

from prcl_fast.config import Config, parse_config
from prcl_fast.config.bundled import find_config
from prcl_fast.config.files import (
    PATH_KEYS,
    anchored,
    apply_override,
    read_tree,
    say_on_stderr,
    set_value,
)
from prcl_fast.config.messages import first_message, shortened
from prcl_fast.config.types import PathString, Section
from prcl_fast.errors import InputError

MAX_RUNS = 10_000
_MAX_NAME = 100
_SWEEPS_OWN = {"output": "the sweep's key output", "seed": "the sweep's key seeds", "base": "config"}
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


class AxisEntry(Section):
    """One entry of an axis: its changes of a configuration."""

    config: str | None = Field(None, description="Configuration file, relative to the sweep file.")
    set: dict[str, Any] = Field({}, description="key.path: value.")


class SweepFile(Section):
    """The keys of a sweep file."""

    output: PathString = Field(description="Folder of all runs and of the table.")
    config: str | None = Field(None, description="Configuration file, relative to the sweep file.")
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0], min_length=1, description="Values of the key seed.")
    set: dict[str, Any] = Field({}, description="key.path: value, for every run.")
    axes: dict[str, dict[str, Any]] = Field(description="Axis: entry: its changes (AxisEntry).")


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str  # its folder in the sweep's, such as prcl/12/seed_0
    entries: tuple[str, ...]  # one of each axis, as written in the sweep file
    seed: int
    config: Config


@dataclass(frozen=True)
class Sweep:
    """A sweep: its runs in order; seeds vary fastest, then the last axis."""

    path: Path
    output: Path
    axes: dict[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    runs: tuple[SweepRun, ...]


def read_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Reads a sweep file and builds the configurations of all its runs.

    A run's configuration file is that of the last axis that names one, else the sweep's. Changes are applied
    in this order: the sweep's `set`, the `set` of each axis's entry, the seed, `overrides`. Strings in a
    `set` may contain {AXIS}, the name of the run's entry, and {seed}; {{ and }} stand for braces. Paths in
    the sweep file are relative to it; `output` and paths in overrides are relative to the working directory.

    Args:
        overrides: `key.path=value` for every run; `output=FOLDER` replaces the sweep's.

    Raises:
        InputError: for the first run with a mistake; names the file and the key.
    """
    path = Path(path)
    tree = read_tree(path)
    if "axes" not in tree and {"data", "method", "model", "train"} & tree.keys():
        raise InputError(
            f"{path}: the configuration of a run, not a sweep file: it has no axes; use prcl train"
        )
    own = [override for override in overrides if _first_key(override.partition("=")[0]) == "output"]
    for override in own:
        apply_override(tree, override)
    file = _parse(SweepFile, tree, f"{path}: ")
    axes = _axes(file, path)
    if len(set(file.seeds)) < len(file.seeds):
        raise InputError(f"{path}: seeds: duplicate in {file.seeds}")
    count = math.prod(map(len, axes.values())) * len(file.seeds)
    if count > MAX_RUNS:
        raise InputError(f"{path}: axes: {count} runs; a sweep has at most {MAX_RUNS}")
    folders = {axis: _folders(entries, f"{path}: axes.{axis}") for axis, entries in axes.items()}
    others = [override for override in overrides if override not in own]
    for override in others:
        _check_key(override.partition("=")[0], f"override {shortened(override)}")
    builder = _Builder(path, file, others)
    runs = []
    for entries in itertools.product(*axes.values()):
        chosen = dict(zip(axes, entries, strict=True))
        for seed in file.seeds:
            name = "/".join([*(folders[axis][entry] for axis, entry in chosen.items()), f"seed_{seed}"])
            config = builder.build(name, {axis: axes[axis][chosen[axis]] for axis in axes}, chosen, seed)
            runs.append(SweepRun(name, entries, seed, config))
    names = {axis: tuple(entries) for axis, entries in axes.items()}
    return Sweep(path, file.output, names, tuple(file.seeds), tuple(runs))


class _Builder:
    """Builds configurations; each file is read once."""

    def __init__(self, path: Path, file: SweepFile, overrides: Sequence[str]) -> None:
        self._path, self._file, self._overrides = path, file, overrides
        self._trees: dict[str, dict[str, Any]] = {}
        self._bundled = find_config(path, path) != path

    def build(
        self, name: str, changes: Mapping[str, AxisEntry], chosen: Mapping[str, str], seed: int
    ) -> Config:
        named = [entry.config for entry in changes.values() if entry.config is not None]
        config = named[-1] if named else self._file.config
        if config is None:
            raise InputError(
                f"{self._path}: config: required, because no axis names a configuration file for run {name}"
            )
        if config not in self._trees:
            path = Path(anchored(config, self._path.parent))
            # The line about a bundled sweep holds for the files that it names.
            say, written = (None, path) if self._bundled else (say_on_stderr, Path(config))
            self._trees[config] = read_tree(path, say, written)
        tree = copy.deepcopy(self._trees[config])
        words = {**chosen, "seed": str(seed)}
        sets = {"set": self._file.set}
        sets |= {f"axes.{axis}.{chosen[axis]}.set": entry.set for axis, entry in changes.items()}
        for where, values in sets.items():
            for key, value in values.items():
                self._put(tree, key, value, words, f"{self._path}: {where}")
        tree["seed"] = seed
        for override in self._overrides:
            apply_override(tree, override)
        tree["output"] = str(self._file.output / name)
        return parse_config(tree, f"{self._path}: run {name}")

    def _put(self, tree: dict[str, Any], key: str, value: Any, words: Mapping[str, str], where: str) -> None:
        _check_key(key, where)
        value = _anchored(key, _filled(value, words, f"{where}.{key}"), self._path.parent)
        set_value(tree, key, value, f"{where}.{key}")


def _axes(file: SweepFile, path: Path) -> dict[str, dict[str, AxisEntry]]:
    if not file.axes:
        raise InputError(f"{path}: axes: at least one axis is needed")
    for axis, entries in file.axes.items():
        if axis == "seed":
            raise InputError(f"{path}: axes.seed: seeds are listed by the key seeds")
        if not entries:
            raise InputError(f"{path}: axes.{axis}: at least one entry is needed")
    return {
        axis: {
            name: _parse(AxisEntry, entry, f"{path}: axes.{axis}.{name}: ") for name, entry in entries.items()
        }
        for axis, entries in file.axes.items()
    }


_Model = TypeVar("_Model", bound=Section)


def _parse(model: type[_Model], tree: Any, origin: str) -> _Model:
    if not isinstance(tree, dict):
        raise InputError(f"{origin}a section of keys is expected, got {shortened(tree)}")
    for where, key in _keys_other_than_text(tree, ()):
        raise InputError(f'{origin}{where}: the name {key!r} is not text; write it in quotes: "{key}"')
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{origin}{first_message(error, tree, model)}") from None


def _keys_other_than_text(tree: Mapping[Any, Any], above: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Names that YAML reads as numbers or booleans, such as `off`. Values below `set` are not checked."""
    for key, value in tree.items():
        if not isinstance(key, str):
            yield ".".join(above) or "the top level", key
        elif isinstance(value, dict) and "set" not in above:
            yield from _keys_other_than_text(value, (*above, key))


def _folders(entries: Mapping[str, Any], where: str) -> dict[str, str]:
    """The folder name of each entry."""
    folders: dict[str, str] = {}
    for entry in entries:
        folder = re.sub(r"[^\w.=-]+", "_", entry).strip("_.")
        if not folder or len(folder) > _MAX_NAME:
            raise InputError(
                f"{where}: {shortened(entry)} cannot be a folder name of 1 to {_MAX_NAME} letters or digits"
            )
        for other, taken in folders.items():
            # Some file systems ignore case.
            if taken.casefold() == folder.casefold():
                raise InputError(
                    f"{where}: {shortened(other)} and {shortened(entry)} would share the folder {taken}"
                )
        folders[entry] = folder
    return folders


def _check_key(key: str, where: str) -> None:
    own = _SWEEPS_OWN.get(_first_key(key))
    if own is not None:
        raise InputError(f"{where}: {_first_key(key)} of a run is set by {own}")
    if "=" in key:
        raise InputError(f"{where}: key {shortened(key)} is not a name")


def _first_key(key: str) -> str:
    return key.strip().partition(".")[0]


def _filled(value: Any, words: Mapping[str, str], where: str) -> Any:
    """`value` with the placeholders in all its strings replaced."""
    if isinstance(value, list):
        return [_filled(item, words, where) for item in value]
    if isinstance(value, dict):
        return {key: _filled(item, words, where) for key, item in value.items()}
    if not isinstance(value, str):
        return value

    def fill(found: re.Match[str]) -> str:
        if found[1] is None:
            return found[0][0]
        if found[1] not in words:
            known = ", ".join(f"{{{word}}}" for word in words)
            raise InputError(
                f"{where}: unknown placeholder {shortened(found[0])[1:-1]}; known: {known}; "
                "write {{ and }} for braces"
            )
        return words[found[1]]

    return _PLACEHOLDER.sub(fill, value)


def _anchored(key: str, value: Any, folder: Path) -> Any:
    """`value` with its configuration paths, its own or those of a section, made relative to `folder`."""
    for section, name in PATH_KEYS:
        if key == f"{section}.{name}" and isinstance(value, str):
            return anchored(value, folder)
        if key == section and isinstance(value, dict) and isinstance(value.get(name), str):
            value = value | {name: anchored(value[name], folder)}
    return value
