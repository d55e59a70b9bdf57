"""Check of every label file before training, with a cache of the files found good."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prcl_fast.data.source import IGNORE, Source
from prcl_fast.data.sources.file_source import FileSource
from prcl_fast.data.sources.labels import LabelContent
from prcl_fast.data.tools.scan_cache import Entry, read_entries, write_entries
from prcl_fast.errors import InputError


@dataclass(frozen=True)
class LabelScan:
    """Pixel counts of all labels, and the labels that are wrong.

    Attributes:
        pixels: for each subset int64 [images, C + 1] in the order of its split; the last column counts pixels
            that are not labeled. Zero for the labels with a problem.
        problems: one line for each label that is wrong.
        contents: the ids in the file of each label without a problem; empty for generated labels.
    """

    pixels: Mapping[str, np.ndarray]
    problems: tuple[str, ...]
    contents: Mapping[str, LabelContent]

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
    counts: dict[str, list[int]] = {}
    contents: dict[str, LabelContent] = {}
    problems: dict[str, str] = {}
    files = source if isinstance(source, FileSource) else None
    states: dict[str, tuple[str, str]] = {}
    kept: dict[str, Entry] = {}
    if cache is not None and files is not None:
        states, kept = _states(files, names), read_entries(cache)
        for name, (key, stamp) in states.items():
            entry = kept.get(key)
            if entry and entry.stamp == stamp and files.labels[name].decoder.accepts(entry.content):
                contents[name] = entry.content

    def read(name: str) -> LabelContent | list[int] | str:
        try:
            return _count(source, name) if files is None else files.label_content(name)
        except InputError as error:
            return str(error)

    todo = [name for name in names if name not in contents]
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        results = pool.map(read, todo) if workers else map(read, todo)
        for done, (name, found) in enumerate(zip(todo, results, strict=True), start=1):
            if isinstance(found, str):
                problems[name] = found
            elif isinstance(found, LabelContent):
                contents[name] = found
            else:
                counts[name] = found
            if progress is not None:
                progress(done, len(todo))
    if cache is not None and states and todo:
        kept |= {
            key: Entry(stamp, contents[name]) for name, (key, stamp) in states.items() if name in contents
        }
        write_entries(cache, kept)
    if files is not None:
        counts = {
            name: files.labels[name].decoder.class_pixels(content) for name, content in contents.items()
        }
    nothing = [0] * (len(source.classes) + 1)
    pixels = {
        subset: np.array(
            [counts.get(name, nothing) for name in source.splits[subset].names], dtype=np.int64
        ).reshape(-1, len(nothing))
        for subset in subsets
    }
    return LabelScan(
        pixels,
        tuple(problems[name] for name in names if name in problems),
        {name: contents[name] for name in names if name in contents},
    )


def _count(source: Source, name: str) -> list[int]:
    """The pixels of each class, then of those that are not labeled."""
    found = np.bincount(source.label(name).ravel(), minlength=256)
    return [*found[: len(source.classes)].tolist(), int(found[IGNORE])]


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
