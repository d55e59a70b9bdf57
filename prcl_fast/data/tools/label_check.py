"""Verdict on the labels of a data set: reasons to refuse it before training, and notes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prcl_fast.data.source import IGNORE, Source
from prcl_fast.data.sources.file_source import FileSource
from prcl_fast.data.sources.labels import LabelContent, LabelDecoder, index_positions
from prcl_fast.data.tools.scan import LabelScan, scan_labels
from prcl_fast.errors import InputError

SUBSETS = ("labeled", "val")
_SHOWN = 6  # ids or classes in one line


@dataclass(frozen=True)
class Verdict:
    """The verdict on a data set's labels.

    Attributes:
        refusals: one line for each reason not to train on them, that of a single wrong file aside.
        notes: one line for each thing that is unusual.
    """

    refusals: tuple[str, ...]
    notes: tuple[str, ...]


def check_labels(
    source: Source,
    *,
    cache: Path | None = None,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[str, ...]:
    """Reads the labels of the labeled and validation images, as `scan_labels` does, and returns the notes.

    Raises:
        InputError: a label file is wrong, or the labels as a whole cannot teach or measure the classes.
    """
    scan = scan_labels(source, SUBSETS, cache=cache, workers=workers, progress=progress).check()
    verdict = judge_labels(source, scan)
    if verdict.refusals:
        raise InputError(verdict.refusals[0])
    return verdict.notes


def judge_labels(source: Source, scan: LabelScan) -> Verdict:
    """The verdict on labels that were read without a problem.

    Refused: labeled or validation images without a labeled pixel; labeled pixels of a single class beside
    pixels that are not labeled, as in a binary mask of 0 and 255; a single class that no image has, where
    most pixels are not labeled and all of these have one id; labeled images of a single class; palettes in
    another order from file to file; grey masks whose ids `data.palette` would make other classes. Any other
    class that is missing is a note, because a small set of labeled images can lack a rare class.
    """
    refusals: list[str] = []
    notes: list[str] = []
    for subset in SUBSETS:
        _judge_subset(source, scan, subset, refusals, notes)
    if isinstance(source, FileSource):
        _judge_palettes(source, scan.contents, refusals, notes)
        _judge_greys(source, scan.contents, refusals)
    return Verdict(tuple(refusals), tuple(notes))


def _judge_subset(
    source: Source, scan: LabelScan, subset: str, refusals: list[str], notes: list[str]
) -> None:
    pixels = scan.pixels[subset].sum(axis=0)
    *counts, unlabeled = pixels.tolist()
    missing = [index for index, count in enumerate(counts) if count == 0]
    share = unlabeled / max(1, int(pixels.sum()))
    of_all = f"{100 * share:.1f} % of the pixels are not labeled"
    found = _found(source, scan, subset)
    if len(missing) == len(counts):
        refusals.append(
            f"data.{subset}: no pixel of these images has a label{found}; data.ignore and data.label_map "
            "say which ids count"
        )
        return
    lacks = f"data.{subset}: no pixel of these images has {_names(source, missing)}"
    remedy = _remedy(source, scan, subset, missing)
    one_class = len(missing) == len(counts) - 1
    # Sparse labels lack classes, too, but not one alone that the other images lack as well.
    nowhere = len(missing) == 1 and not any(rows[:, missing].any() for rows in scan.pixels.values())
    if unlabeled and (one_class or (nowhere and share > 0.5 and remedy)):
        refusals.append(f"{lacks}, and {of_all}{found}{remedy}")
    elif one_class and subset == "labeled":
        refusals.append(f"{lacks}, so there is nothing to tell it from{found}")
    elif missing and (subset == "labeled" or one_class):
        sparse = f", and {of_all}" if share > 0.5 else ""
        elsewhere = ""
        if subset == "labeled" and (measured := scan.pixels["val"][:, missing].sum(axis=0)).any():
            held = [index for index, count in zip(missing, measured, strict=True) if count]
            elsewhere = f", although those of data.val have {_names(source, held)}"
        notes.append(lacks + sparse + elsewhere + remedy)
    elif share > 0.5:
        notes.append(f"data.{subset}: {of_all}{found}")


def _names(source: Source, classes: Sequence[int]) -> str:
    shown = ", ".join(source.classes[index] for index in classes[:_SHOWN])
    more = f" and {len(classes) - _SHOWN} more" if len(classes) > _SHOWN else ""
    return f"{'class' if len(classes) == 1 else 'the classes'} {shown}{more}"


def _ids(source: Source, scan: LabelScan, subset: str) -> Counter[int]:
    """The pixels of each id in the label files of a subset, masks of colours aside."""
    ids: Counter[int] = Counter()
    for name in source.splits[subset].names:
        content = scan.contents.get(name)
        if content is not None and content.reading != "colours":
            ids.update(content.pixels)
    return ids


def _found(source: Source, scan: LabelScan, subset: str) -> str:
    """The ids in the label files of a subset and the first of the files, for a message."""
    if not isinstance(source, FileSource):
        return ""
    ids = _ids(source, scan, subset)
    first = source.labels[source.splits[subset].names[0]].path
    if not ids:
        return f"; the first mask is {first}"
    whole = sum(ids.values())
    shown = ", ".join(f"{value} ({100 * ids[value] / whole:.1f} %)" for value in sorted(ids)[:_SHOWN])
    return f"; ids in the files: {shown}{', ...' if len(ids) > _SHOWN else ''}, the first is {first}"


def _remedy(source: Source, scan: LabelScan, subset: str, missing: Sequence[int]) -> str:
    """The entry of `data.label_map` that would make the one id that is not labeled the one missing class."""
    if not isinstance(source, FileSource) or len(missing) != 1:
        return ""
    table = source.labels[source.splits[subset].names[0]].decoder.table
    unlabeled = [value for value in _ids(source, scan, subset) if table[value] == IGNORE]
    if len(unlabeled) != 1:
        return ""
    entry = f"{{{unlabeled[0]}: {missing[0]}}}"
    return f"; if id {unlabeled[0]} means {source.classes[missing[0]]}: data.label_map: {entry}"


def _judge_palettes(
    source: FileSource, contents: Mapping[str, LabelContent], refusals: list[str], notes: list[str]
) -> None:
    """Compares the palettes of files that are read by their indices, without what is not labeled."""
    colour_of: dict[int, tuple[int, Path]] = {}  # first colour of an index
    indices_of: dict[int, tuple[set[int], Path]] = {}  # all indices of a colour
    differs = moved = ""
    for name, content in contents.items():
        if content.reading != "indices":
            continue
        path, table = source.labels[name].path, source.labels[name].decoder.table
        here: dict[int, set[int]] = {}
        for index, colour in content.colours.items():
            if table[index] == IGNORE:
                continue
            here.setdefault(colour, set()).add(index)
            other, other_path = colour_of.setdefault(index, (colour, path))
            if other != colour and not differs:
                differs = f"{path}: index {index} is colour {_rgb(colour)}, but {_rgb(other)} in {other_path}"
        for colour, indices in here.items():
            others, other_path = indices_of.setdefault(colour, (set(indices), path))
            if others.isdisjoint(indices) and not moved:
                moved = f"{path}: {_rgb(colour)} is index {min(indices)}, but {min(others)} in {other_path}"
            others |= indices
    if differs and moved:
        refusals.append(
            f"{moved}: these palettes have different orders, so that indices are no class ids; data.palette "
            "says which class a colour is"
        )
    elif differs:
        notes.append(f"{differs}; the indices are read as ids")


def _judge_greys(source: FileSource, contents: Mapping[str, LabelContent], refusals: list[str]) -> None:
    """Refuses grey masks beside masks of colours if ids and greys would be different classes."""
    coloured = next((name for name, content in contents.items() if content.reading == "colours"), None)
    if coloured is None:
        return
    for name, content in contents.items():
        decoder, path = source.labels[name].decoder, source.labels[name].path
        grey = _other_reading(decoder, content) if content.reading == "grey" else None
        if grey is not None:
            refusals.append(
                f"{path}: a grey mask with id {grey}, whose colour is another class in data.palette, while "
                f"{source.labels[coloured].path} is one of colours; `prcl data convert` makes masks of ids"
            )
            return


def _other_reading(decoder: LabelDecoder, content: LabelContent) -> int | None:
    """The first id whose grey `data.palette` gives another class, if it has all greys of the file."""
    if decoder.colours is None or content.pixels.keys() != content.colours.keys():
        return None
    ids = list(content.colours)
    shown = np.array([_channels(colour) for colour in content.colours.values()], dtype=np.uint8)
    positions = index_positions(shown, decoder.colours)[: len(ids)]
    if (positions < 0).any():
        return None
    classes = np.where(positions < decoder.num_classes, positions, IGNORE)
    other = classes != decoder.table[ids]
    return ids[int(np.argmax(other))] if other.any() else None


def _channels(colour: int) -> tuple[int, int, int]:
    return colour >> 16, colour >> 8 & 255, colour & 255


def _rgb(colour: int) -> str:
    return str(_channels(colour))
