"""Checking every label before a training starts, with a cache so that the second time costs nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prcl_fast.data.atomic import write_text
from prcl_fast.data.file_source import FileSource
from prcl_fast.data.source import IGNORE, Source
from prcl_fast.errors import InputError

CACHE_NAME = "label_scan.json"
_VERSION = 1


@dataclass(frozen=True)
class LabelScan:
    """What the labels hold.

    Attributes:
        pixels: for each subset int64 [images, C + 1] in the order of its split; the last column counts pixels
            that are not labeled. Zero for the labels with a problem.
        problems: one line for each label that is wrong.
    """

    pixels: Mapping[str, np.ndarray]
    problems: tuple[str, ...]


def scan_labels(
    source: Source,
    subsets: Sequence[str] = ("labeled", "val"),
    *,
    cache: Path | None = None,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> LabelScan:
    """`inspect_labels` that raises InputError with the first problem and the number of the others."""
    scan = inspect_labels(source, subsets, cache=cache, workers=workers, progress=progress)
    if scan.problems:
        more = f" (and {len(scan.problems) - 1} more labels are wrong)" if len(scan.problems) > 1 else ""
        raise InputError(scan.problems[0] + more)
    return scan


def inspect_labels(
    source: Source,
    subsets: Sequence[str] = ("labeled", "val"),
    *,
    cache: Path | None = None,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> LabelScan:
    """Reads every label: is it readable, are its ids in range, is its size that of the image?

    Args:
        source: the data set.
        subsets: which of its splits.
        cache: folder that keeps the counts of labels found good, by path, size and time of change of label
            and image; written whole or not at all. None keeps nothing.
        workers: threads that decode; 0 decodes in the calling thread.
        progress: called with (labels done, labels in all).
    """
    names = list(dict.fromkeys(name for subset in subsets for name in source.splits[subset].names))
    keys = {name: _key(source, name) for name in names} if isinstance(source, FileSource) else {}
    kept = _read_cache(cache) if cache is not None and keys else {}
    counts: dict[str, list[int]] = {name: kept[keys[name]] for name in names if keys.get(name) in kept}
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
    if cache is not None and keys and todo:
        kept.update({keys[name]: counts[name] for name in names if name in counts})
        write_text(cache / CACHE_NAME, json.dumps({"version": _VERSION, "labels": kept}))
    nothing = [0] * (len(source.classes) + 1)
    pixels = {
        subset: np.array(
            [counts.get(name, nothing) for name in source.splits[subset].names], dtype=np.int64
        ).reshape(-1, len(nothing))
        for subset in subsets
    }
    return LabelScan(pixels, tuple(problems[name] for name in names if name in problems))


def _key(source: FileSource, name: str) -> str:
    """Names a label in one state of its files, read in one way."""
    label = source.labels.get(name)
    if label is None:
        return ""
    stamps = []
    for path in (label.path, source.images[name]):
        try:
            state = os.stat(path)
        except OSError:
            return ""
        stamps.append(f"{state.st_size}-{state.st_mtime_ns}")
    return "|".join((str(label.path.absolute()), *stamps, label.decoder.fingerprint))


def _read_cache(folder: Path) -> dict[str, Any]:
    """The counts kept in a folder; nothing where the file is missing or damaged, for it can be made again."""
    try:
        tree = json.loads((folder / CACHE_NAME).read_text(encoding="utf-8"))
        return dict(tree["labels"]) if tree["version"] == _VERSION else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
