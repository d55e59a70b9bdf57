"""Split files: lists of labeled, unlabeled and validation images, in all public forms.

The part of a line that names the image is its id: `2011_000068`, `aachen_000013_000019`, or the path without
suffix in a user's data set.

    form      a line
    ids       2011_000068
    stems     aachen_000013_000019_leftImg8bit
    paths     leftImg8bit/train/hamburg/hamburg_000000_080169_leftImg8bit.png
    pairs     JPEGImages/2011_000068.jpg SegmentationClass/2011_000068.png
    tabs      /images/train/jena_000078_000019.png <tab> /segmentation/train/jena_000078_000019_gtFine.png
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from prcl_fast.data.source import Split
from prcl_fast.data.sources.images import IMAGE_SUFFIXES
from prcl_fast.data.sources.listing import composed
from prcl_fast.errors import InputError
from prcl_fast.files.reading import read_text

Form = Literal["ids", "stems", "paths", "pairs", "tabs"]

VOC_ID = re.compile(r"\d{4}_\d{6}")
CITYSCAPES_ID = re.compile(r"[a-z-]+_\d{6}_\d{6}")
CITYSCAPES_SUFFIX = "_leftImg8bit"

_LABEL_SUFFIXES = (*IMAGE_SUFFIXES, ".gif")  # a GIF label is found, and refused with the reason
_SUFFIX, _LABEL_SUFFIX = ("|".join(map(re.escape, some)) for some in (IMAGE_SUFFIXES, _LABEL_SUFFIXES))
_PAIR = re.compile(rf"(\S.*?(?:{_SUFFIX}))\s+(\S.*(?:{_LABEL_SUFFIX}))", re.IGNORECASE)
# C0, C1, line and paragraph separators: with one of them a message would have several lines.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_MAX_BYTES = 64 * 2**20
_MAX_LINE = 4096  # the longest path
_WRITTEN_AS = {
    "ids": "ids",
    "stems": "Cityscapes stems",
    "paths": "image paths",
    "pairs": "image and label paths",
    "tabs": "two paths with a tab",
}


@dataclass(frozen=True)
class Entry:
    """One line of a split file; its paths, if any, are relative to the data set's root.

    The name is composed (NFC), paths are in the form of the line.
    """

    line: int
    text: str
    name: str
    image: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class SplitFile:
    """A split file, with the line of each id for messages."""

    path: Path
    form: Form
    entries: tuple[Entry, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.entries)

    @cached_property
    def split(self) -> Split:
        return make_split(self.names, self.form)


def make_split(names: Sequence[str], form: Form = "ids") -> Split:
    """The split of ids that were written in the given form."""
    known = KNOWN_LISTS.get(fingerprint(sorted(names)))
    family = _syntax(names, form) + (f", {known}" if known else "")
    return Split(family, tuple(names), fingerprint(names))


def fingerprint(names: Iterable[str]) -> str:
    """12 hex digits of SHA-256 over the ids joined by newlines."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]


def read_split(path: str | Path) -> SplitFile:
    """Reads a split file of any public form.

    Blank lines, CRLF, a byte order mark, backslashes for slashes and a missing last newline are tolerated.

    Raises:
        InputError: unreadable, empty, an id twice, mixed forms, a path outside the data set, or a file or
            line that is too long; names file and line.
    """
    path = Path(path)
    text = read_text(path, "split file", _MAX_BYTES)
    entries: list[Entry] = []
    first_line: dict[str, int] = {}
    form: Form | None = None
    for number, raw in enumerate(text.split("\n"), start=1):
        line = raw.strip(" \t")
        if not line:
            continue
        if len(line) > _MAX_LINE:
            raise InputError(f"{path}:{number}: {len(line)} characters; a line has at most {_MAX_LINE}")
        line_form, entry = _parse(line, f"{path}:{number}", number)
        if form is None:
            form = line_form
        if line_form != form:
            raise InputError(
                f"{path}:{number}: written as {_WRITTEN_AS[line_form]}, "
                f"the lines above as {_WRITTEN_AS[form]}{separator_hint(line)}"
            )
        if entry.name in first_line:
            raise InputError(
                f"{path}:{number}: {entry.name} is duplicated; first in line {first_line[entry.name]}"
            )
        first_line[entry.name] = number
        entries.append(entry)
    if form is None:
        raise InputError(f"{path}: the split file is empty")
    return SplitFile(path, form, tuple(entries))


def check_disjoint(files: Sequence[SplitFile]) -> None:
    """Raises InputError if two files have ids in common, naming both, the first such id and their number."""
    for position, later in enumerate(files):
        for earlier in files[:position]:
            others = set(earlier.names)
            common = [name for name in later.names if name in others]
            if common:
                raise InputError(
                    f"{later.path} and {earlier.path} have {len(common)} of their ids in common, "
                    f"the first is {common[0]}"
                )


def separator_hint(line: str) -> str:
    """The end of a message about a line that may be a row of a table."""
    mark = next((mark for mark in ",;" if mark in line), None)
    return "" if mark is None else f"; paths of image and label are separated by a space or tab, not {mark!r}"


def _parse(text: str, where: str, number: int) -> tuple[Form, Entry]:
    form: Form
    line = text.replace("\\", "/")
    image: str
    label: str | None = None
    if "\t" in line:
        paths = line.split("\t")
        if len(paths) != 2:
            raise InputError(f"{where}: {len(paths)} columns; one or two are expected")
        form = "tabs"
        image, label = (part.strip(" ") for part in paths)
    # Lines without a suffix at the end are excluded first, since the pattern is slow on them.
    elif line.lower().endswith(_LABEL_SUFFIXES) and (pair := _PAIR.fullmatch(line)):
        form = "pairs"
        image, label = pair.groups()
    else:
        form, image = "ids", line.removeprefix("./")
    if label is not None:
        # A leading slash stands for the root of the data set.
        image, label = image.removeprefix("/"), label.removeprefix("/")
        _check_path(label, where)
    _check_path(image, where)
    name = composed(_name(image))
    if label is None and _has_suffix(image):
        form = "paths"
    elif label is None and image == _name(image) + CITYSCAPES_SUFFIX:
        form = "stems"
    return form, Entry(number, text, name, None if form in ("ids", "stems") else image, label)


def check_inside(path: str, where: str) -> None:
    """Raises InputError, beginning with `where`, if a relative `path` leads out of its folder."""
    if _CONTROL.search(path):
        raise InputError(f"{where}: a control character in {path!r}")
    leaves = ".." in _parts(path) or path.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", path)
    if leaves:
        raise InputError(f"{where}: {path!r} leaves the data set; ids and paths are relative to its root")


def _check_path(path: str, where: str) -> None:
    check_inside(path, where)
    parts = _parts(path)
    if "" in parts or "." in parts:
        raise InputError(f"{where}: {path!r} is no id and no path of a file")


def _parts(path: str) -> list[str]:
    return re.split(r"[/\\]", path)


def _has_suffix(path: str) -> bool:
    return path.lower().endswith(IMAGE_SUFFIXES)


def _name(path: str) -> str:
    """The id of an image: its short name in known layouts, else the path without suffix."""
    stem = path[: path.rindex(".")] if _has_suffix(path) else path
    folder, _, base = stem.rpartition("/")
    if base.endswith(CITYSCAPES_SUFFIX):
        return base.removesuffix(CITYSCAPES_SUFFIX)
    if CITYSCAPES_ID.fullmatch(base) or folder.rpartition("/")[2] == "JPEGImages":
        return base
    return stem


def _syntax(names: Sequence[str], form: Form) -> str:
    voc = all(VOC_ID.fullmatch(name) for name in names)
    cityscapes = all(CITYSCAPES_ID.fullmatch(name) for name in names)
    kind = "VOC" if voc else "Cityscapes" if cityscapes else ""
    if form == "tabs":
        return f"CPS ({kind or 'two'} paths with a tab)"
    if form == "pairs":
        return f"UniMatch ({kind or 'image and label'} path pairs)"
    if form == "paths":
        return "U2PL (Cityscapes paths)" if cityscapes else "image paths"
    if form == "stems":
        return "PRCL (Cityscapes stems)"
    return "VOC ids" if voc else "Cityscapes ids" if cityscapes else "ids"


# By the 12 hex digits of `fingerprint` over the sorted ids, independent of order and form.
KNOWN_LISTS: dict[str, str] = {
    "124b0aab2fcd": "92 labeled of U2PL = UniMatch = PseudoSeg 1/16",
    "7ea77f8ddd7b": "92 unlabeled of U2PL = UniMatch",
    "79b959bccf77": "183 labeled of U2PL",
    "92513e42c678": "183 unlabeled of U2PL",
    "f0e702c687e2": "366 labeled of U2PL",
    "0bee39f227c8": "366 unlabeled of U2PL",
    "8c23014f5128": "732 labeled of U2PL",
    "2080ec33c9d7": "732 unlabeled of U2PL",
    "129f1fe99172": "1464 labeled of U2PL",
    "6d42f86cb89e": "1464 unlabeled of U2PL",
    "1c27978cdf51": "1/2 labeled of PseudoSeg (CPS)",
    "22be7051e35a": "1/16 unlabeled of PseudoSeg (CPS)",
    "d65246e0d2ff": "1/2 unlabeled of PseudoSeg (CPS)",
    "feea46927383": "662 labeled of U2PL = PRCL",
    "c3164407fe1a": "662 unlabeled of U2PL = PRCL",
    "baa85754594f": "662 labeled of CPS = UniMatch",
    "c38f02fc6adc": "662 unlabeled of CPS = UniMatch",
    "6f8edc379937": "val",
    "f20f7c7dea9c": "186 labeled of U2PL",
    "d01da4f44587": "186 unlabeled of U2PL",
    "1e5363dd012c": "186 labeled of CPS = UniMatch",
    "61bcee728acc": "186 unlabeled of CPS = UniMatch",
    "f13edf481be9": "372 labeled of U2PL",
    "3758d38898f6": "372 unlabeled of U2PL",
    "639dfd9068a5": "150 labeled of PRCL, seed 3407",
    "4f5a4dc5c3c7": "150 unlabeled of PRCL, seed 3407",
    "9e85f1e65cf6": "val",
    "f3ac653e7763": "test (its labels are not public)",
}
