"""Check of every label file before training, with a cache of the files found good."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prcl_fast.data.source import IGNORE, Source
from prcl_fast.data.sources.file_source import FileSource
from prcl_fast.errors import InputError, WriteError
from prcl_fast.files.writing import write_text

_VERSION = 2
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelScan:
    """Pixel counts of all labels, and the labels that are wrong.

    Attributes:
        pixels: for each subset int64 [images, C + 1] in the order of its split; the last column counts pixels
            that are not labeled. Zero for the labels with a problem.
        problems: one line for each label that is wrong.
    """

    pixels: Mapping[str, np.ndarray]
    problems: tuple[str, ...]

    def check(self) -> LabelScan:
        """This scan. Raises InputError with the first problem and the number of further ones."""
        if self.problems:
            more = f" (and {len(self.problems) - 1} more labels are wrong)" if len(self.problems) > 1 else ""
            raise InputError(self.problems[0] + more)
        return self


def scan_labels(
    source: Source,
    subsets: Sequence[str] = ("labeled", "val"),
    *,
    cache: Path | None = None,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> LabelScan:
    """Reads every label and checks that it can be decoded, has known ids, and has the size of its image.

    Args:
        source: the data set.
        subsets: names of the splits to check.
        cache: JSON file with the counts of labels found good, by path, size and modification time of label
            and image; written whole or not at all. None keeps nothing.
        workers: threads that decode; 0 decodes in the calling thread.
        progress: called with (labels done, labels in all).
    """
    names = list(dict.fromkeys(name for subset in subsets for name in source.splits[subset].names))
    states = _states(source, names) if cache is not None and isinstance(source, FileSource) else {}
    kept = _read_cache(cache) if cache is not None else {}
    counts: dict[str, list[int]] = {}
    for name, (key, stamp) in states.items():
        if key in kept and kept[key][0] == stamp:
            counts[name] = kept[key][1]
    problems: dict[str, str] = {}
    todo = [name for name in names if name not in counts]

    def count(name: str) -> tuple[list[int] | None, str]:
        try:
            label = source.label(name)
        except InputError as error:
            return None, str(error)
        found = np.bincount(label.ravel(), minlength=256)
        classes = len(source.classes)
        return [*found[:classes].tolist(), int(found[IGNORE])], ""

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        results = pool.map(count, todo) if workers else map(count, todo)
        for done, (name, (found, problem)) in enumerate(zip(todo, results, strict=True), start=1):
            if found is None:
                problems[name] = problem
            else:
                counts[name] = found
            if progress is not None:
                progress(done, len(todo))
    if cache is not None and states and todo:
        kept.update({key: [stamp, counts[name]] for name, (key, stamp) in states.items() if name in counts})
        _write_cache(cache, kept)
    nothing = [0] * (len(source.classes) + 1)
    pixels = {
        subset: np.array(
            [counts.get(name, nothing) for name in source.splits[subset].names], dtype=np.int64
        ).reshape(-1, len(nothing))
        for subset in subsets
    }
    return LabelScan(pixels, tuple(problems[name] for name in names if name in problems))


def _states(source: FileSource, names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """For every label that exists: a key of file and decoder, and the state of the label and image files."""
    states = {}
    for name in names:
        label = source.labels.get(name)
        if label is None:
            continue
        try:
            found = [os.stat(path) for path in (label.path, source.images[name])]
        except OSError:
            continue
        stamp = " ".join(f"{state.st_size}-{state.st_mtime_ns}" for state in found)
        states[name] = (f"{label.decoder.fingerprint} {label.path.absolute()}", stamp)
    return states


def _read_cache(file: Path) -> dict[str, Any]:
    """The stored counts; empty if the file is missing or damaged, since they can be counted again."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        return dict(tree["labels"]) if tree["version"] == _VERSION else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write_cache(file: Path, kept: Mapping[str, Any]) -> None:
    try:
        write_text(file, json.dumps({"version": _VERSION, "labels": kept}))
    except WriteError as error:  # a read-only home costs time, not the run
        _log.warning("the scan of the labels cannot be kept: %s", error)
