"""Comparison of runs, grouped over seeds, with the settings in which the groups differ."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prcl_fast.analysis.seed_statistics import MISSING, Summary, cell_texts, summarize
from prcl_fast.config import Config, load_stored_config
from prcl_fast.config.files import PATH_KEYS, RUN_KEYS
from prcl_fast.console.text import duration
from prcl_fast.errors import InputError
from prcl_fast.runs.folder import CONFIGURATION, settings
from prcl_fast.runs.metrics import METRICS, RunResult, read_result

_RESULTS = ("seeds", "mIoU", "best", "iterations", "time")
_PATHS = {f"{section}.{key}" for section, key in (*PATH_KEYS, *RUN_KEYS)}
_SEED = "{seed}"
# Settings that an evaluation depends on besides the network.
_EVALUATION = ("data.kind", "data.root", "data.val", "data.labels", "data.label_map", "data.ignore")


@dataclass(frozen=True)
class ComparedRun:
    """A run folder, its configuration and its results."""

    folder: Path
    config: Config
    result: RunResult


@dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed; `settings` are the common ones, key.path: value."""

    runs: tuple[ComparedRun, ...]
    settings: Mapping[str, Any]

    def summary(self, score: str) -> Summary | None:
        """Mean over the seeds of "miou" (last evaluations), "best_miou" or "seconds"."""
        return summarize(getattr(run.result, score) for run in self.runs)

    def iterations(self) -> str:
        """The iterations of its runs, such as "400 of 600" for unfinished ones."""
        totals = {run.config.train.iterations for run in self.runs}
        least = min(run.result.iteration for run in self.runs)
        return str(least) if totals == {least} else f"{least} of {max(totals)}"


@dataclass(frozen=True)
class Comparison:
    """Groups of runs.

    Attributes:
        columns: for every setting in which groups differ, its short name and the text of each group.
        warnings: reasons why the numbers may not be comparable.
    """

    groups: tuple[Group, ...]
    columns: Mapping[str, Sequence[str]]
    warnings: tuple[str, ...]

    def header(self) -> list[str]:
        """Names of the settings, then of the results."""
        return [*self.columns, *_RESULTS]

    def rows(self, *, bold: str = "**") -> list[list[str]]:
        """A line of text for each group; the best means are bold."""
        seconds = [group.summary("seconds") for group in self.groups]
        results = zip(
            [str(len(group.runs)) for group in self.groups],
            cell_texts([group.summary("miou") for group in self.groups], bold=bold),
            cell_texts([group.summary("best_miou") for group in self.groups], bold=bold),
            [group.iterations() for group in self.groups],
            [MISSING if time is None else duration(time.mean) for time in seconds],
            strict=True,
        )
        return [
            [*(self.columns[name][index] for name in self.columns), *texts]
            for index, texts in enumerate(results)
        ]

    def label(self, index: int) -> str:
        """The label of a group, such as "prcl, tau 0.1"."""
        parts = []
        for name, texts in self.columns.items():
            if texts[index] != MISSING:
                parts.append(texts[index] if name == "method" else f"{name} {texts[index]}")
        return ", ".join(parts)


def find_runs(paths: Sequence[str | Path]) -> list[ComparedRun]:
    """The runs in these folders, or anywhere below them, each once.

    Raises:
        InputError: no such folder, no run in it, or a run's configuration or metrics cannot be read.
    """
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise InputError(f"{path}: no such run folder")
        found = [path] if _is_run(path) else sorted(file.parent for file in path.rglob(METRICS))
        found = [folder for folder in found if _is_run(folder)]
        if not found:
            raise InputError(f"{path}: {_no_run(path)}")
        for folder in found:
            folders.setdefault(folder.resolve(), folder)
    return [
        ComparedRun(folder, load_stored_config(folder / "config.yaml"), read_result(folder))
        for folder in folders.values()
    ]


def compare(runs: Sequence[ComparedRun]) -> Comparison:
    """Groups runs over their seeds, in the given order, and finds the settings in which the groups differ."""
    flat = _comparable([run.config for run in runs])
    groups: dict[Hashable, list[int]] = {}
    for index, values in enumerate(flat):
        groups.setdefault(_hashable(values), []).append(index)
    merged = tuple(
        Group(tuple(runs[index] for index in indices), flat[indices[0]]) for indices in groups.values()
    )
    return Comparison(merged, _columns([group.settings for group in merged]), _warnings(runs, merged))


def _is_run(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (METRICS, CONFIGURATION))


def _no_run(path: Path) -> str:
    """The reason why no run is in the folder `path` or below it."""
    if (path / METRICS).is_file():
        return f"{CONFIGURATION} is missing, so its run cannot be compared"
    begun = sorted(path.rglob(CONFIGURATION))
    if begun:
        return f"the run in {begun[0].parent} has no {METRICS} yet; it is written while the run trains"
    return f"no run in this folder or below it: no folder holds {METRICS} and {CONFIGURATION}"


def _comparable(configs: Sequence[Config]) -> list[dict[str, Any]]:
    """The settings of each run without its seed, which is also removed from paths that contain it."""
    flat = []
    for config in configs:
        values = settings(config)
        del values["seed"]
        for key in _PATHS & values.keys():
            if isinstance(values[key], str):
                values[key] = os.path.normpath(values[key])
        flat.append(values)
    for key in _PATHS:
        paths = [values.get(key) for values in flat]
        patterns = [
            _without_seed(path, config.seed) if isinstance(path, str) else None
            for path, config in zip(paths, configs, strict=True)
        ]
        # A number in a path is the seed only if another run has its own seed in the same place.
        seeds: dict[str | None, set[int]] = {}
        for pattern, config in zip(patterns, configs, strict=True):
            seeds.setdefault(pattern, set()).add(config.seed)
        for values, pattern in zip(flat, patterns, strict=True):
            if pattern is not None and len(seeds[pattern]) > 1:
                values[key] = pattern
    return flat


def _without_seed(path: str, seed: int) -> str | None:
    """The path with {seed} in place of the last such number; None without one."""
    found = list(re.finditer(rf"(?<!\d){seed}(?!\d)", path))
    return f"{path[: found[-1].start()]}{_SEED}{path[found[-1].end() :]}" if found else None


def _columns(groups: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Name and texts of each setting in which the groups that have it differ, and always of the method."""
    keys = list(dict.fromkeys(key for values in groups for key in values))
    differing = [
        key
        for key in keys
        if key == "method.name" or len({_hashable(values[key]) for values in groups if key in values}) > 1
    ]
    ordered = sorted(differing, key=lambda key: key != "method.name")
    columns: dict[str, list[str]] = {}
    for key in ordered:
        texts = _texts([values.get(key, MISSING) for values in groups], is_path=key in _PATHS)
        # The labeled and unlabeled lists of a split differ together.
        if key in _PATHS and texts in columns.values():
            continue
        columns[_short(key, ordered)] = texts
    return columns


def _short(key: str, keys: Sequence[str]) -> str:
    if key == "method.name":
        return "method"
    last = key.rpartition(".")[2]
    unique = sum(other.rpartition(".")[2] == last for other in keys) == 1
    return last if unique and last != "method" and last not in _RESULTS else key


def _texts(values: Sequence[Any], *, is_path: bool) -> list[str]:
    if is_path and all(isinstance(value, str) for value in values):
        return _distinct_parts([str(value).split("/") for value in values])
    return [_text(value) for value in values]


def _distinct_parts(paths: Sequence[list[str]]) -> list[str]:
    """Paths without their common first and last folders."""
    shortest = min(map(len, paths))
    start = 0
    while start < shortest - 1 and len({path[start] for path in paths}) == 1:
        start += 1
    end = 0
    while end < shortest - start - 1 and len({path[-1 - end] for path in paths}) == 1:
        end += 1
    return ["/".join(path[start : len(path) - end]) for path in paths]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _warnings(runs: Sequence[ComparedRun], groups: Iterable[Group]) -> tuple[str, ...]:
    warnings = []
    evaluations = [_evaluation(run.config) for run in runs]
    keys = dict.fromkeys(key for evaluation in evaluations for key in evaluation)
    differing = [
        key for key in keys if len({_hashable(evaluation.get(key)) for evaluation in evaluations}) > 1
    ]
    if differing:
        warnings.append(
            "the runs were evaluated differently, so their mIoU cannot be compared: "
            f"{', '.join(differing)} differ"
        )
    unfinished = [run for run in runs if run.result.iteration < run.config.train.iterations]
    if unfinished:
        warnings.append(
            f"{len(unfinished)} of {len(runs)} runs are not finished, the first is {unfinished[0].folder}"
        )
    twice = [group for group in groups if len({run.config.seed for run in group.runs}) < len(group.runs)]
    if twice:
        warnings.append(
            f"a row contains runs of the same seed, the first is {twice[0].runs[0].folder}: their deviation "
            "is smaller than over seeds"
        )
    return tuple(warnings)


def _evaluation(config: Config) -> dict[str, Any]:
    """The settings that determine the images and the mode of a run's evaluation."""
    values = settings(config)
    chosen = {key: values[key] for key in _EVALUATION}
    chosen |= {key: value for key, value in values.items() if key.startswith("eval.") and key != "eval.batch"}
    if config.data.kind == "synthetic":
        chosen |= {
            f"data.synthetic.{key}": values[f"data.synthetic.{key}"] for key in ("size", "val", "seed")
        }
    for key in ("data.root", "data.val"):
        if chosen[key] is not None:
            chosen[key] = os.path.realpath(chosen[key])
    for mode, key in (("center", "crop"), ("sliding", "window")):
        used = config.eval.mode == mode
        chosen[f"eval.{key}"] = (chosen[f"eval.{key}"] or config.data.crop) if used else None
    return chosen


def _hashable(value: Any) -> Hashable:
    if isinstance(value, dict):
        return tuple(sorted((key, _hashable(item)) for key, item in value.items()))
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
