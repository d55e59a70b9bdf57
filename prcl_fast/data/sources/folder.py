"""A user's data set: two folders of images and labels, or two path patterns with {name}."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from prcl_fast.config import DataConfig
from prcl_fast.data.sources.file_source import (
    FileSource,
    LabelFile,
    class_names,
    class_palette,
    data_root,
    locate_files,
)
from prcl_fast.data.sources.images import IMAGE_SUFFIXES, MASK_SUFFIXES, UNREAD_SUFFIXES, why_unread
from prcl_fast.data.sources.labels import LabelDecoder, label_decoder
from prcl_fast.data.sources.listing import composed, existing, files_below, walk
from prcl_fast.data.sources.splits import Entry, check_inside
from prcl_fast.data.sources.voc import voc_palette
from prcl_fast.errors import InputError


def build_folder(data: DataConfig) -> FileSource:
    """A data set whose images and labels are found by the names in the split files.

    `data.images` and `data.labels` are folders below root, searched with their subfolders for `NAME.suffix`,
    or patterns such as `{name}_mask.png`. A name may contain subfolders ("train/0001"), or omit them if it is
    unambiguous. Lines with two paths, relative to root, name image and label themselves.

    Raises:
        InputError: naming the file, folder or key at fault.
    """
    classes = class_names(data.classes, ())
    palette = class_palette(data.palette, len(classes), voc_palette(len(classes)))
    layout = _FolderLayout(data, label_decoder(data, len(classes)))
    return locate_files(data, classes, palette, layout)


class _FolderLayout:
    def __init__(self, data: DataConfig, decoder: LabelDecoder) -> None:
        self.root = data_root(data)
        self.decoder = decoder
        self.images = _Finder(self.root, data.images, IMAGE_SUFFIXES, "data.images")
        self.labels = _Finder(self.root, data.labels, MASK_SUFFIXES, "data.labels")

    def image(self, entry: Entry) -> Path | None:
        path = None if entry.image is None else existing(self.root, entry.image)
        if path is not None or entry.label is not None:
            return path
        return self.images.find(entry.name)

    def label(self, entry: Entry, image: Path) -> LabelFile | None:
        path: Path | None
        if entry.label is not None:
            path = existing(self.root, entry.label)
        else:
            # A name in several subfolders is resolved by the subfolder of the image.
            place = self.images.place(image)
            path = (self.labels.exact(place) if place else None) or self.labels.find(entry.name)
        return None if path is None else LabelFile(path, self.decoder)

    def missing_image(self, entry: Entry) -> str:
        if entry.label is not None:
            return f"{self.root / str(entry.image)} does not exist"
        return self.images.missing(entry.name)

    def missing_label(self, entry: Entry) -> str:
        if entry.label is not None:
            return f"{self.root / entry.label} does not exist"
        return self.labels.missing(entry.name)


class _Finder:
    """Search for files by name: in a folder, which is listed once, or by a pattern."""

    def __init__(self, root: Path, where: str, suffixes: tuple[str, ...], key: str) -> None:
        where = where.replace("\\", "/")
        check_inside(where, key)
        self.root, self.suffixes, self.key = root, suffixes, key
        self.pattern = where if "{name}" in where else None
        self.folder = root / where
        self.prefix = composed(self.folder.relative_to(root).as_posix()) + "/"
        # Files by composed path without suffix, and by composed bare name.
        self.by_place: defaultdict[str, list[Path]] = defaultdict(list)
        self.by_base: defaultdict[str, list[Path]] = defaultdict(list)
        self.unread: dict[str, Path] = {}  # image files of other suffixes, by all their names
        self.listed: set[str] = set()
        if self.pattern is None:
            if not os.path.isdir(self.folder):
                raise InputError(f"{self.folder}: no such folder ({key})")
            for place, files in walk(self.folder):
                for path in self._list(place, [place / file for file in files]):
                    self.by_base[composed(path.stem)].append(path)

    def _list(self, place: Path, files: Iterable[Path]) -> list[Path]:
        """Adds the files of a folder by their places; returns those of the right suffixes."""
        below = self._below(place)
        self.listed.add(below)
        prefix = "" if below == "." else f"{below}/"
        found = []
        for path in files:
            stem, suffix = os.path.splitext(composed(path.name))
            if suffix.lower() in self.suffixes:
                self.by_place[prefix + stem].append(path)
                found.append(path)
            elif suffix.lower() in (*IMAGE_SUFFIXES, *UNREAD_SUFFIXES):
                for name in (stem, stem + suffix):
                    self.unread.setdefault(name, path)
                    self.unread.setdefault(prefix + name, path)
        return found

    def exact(self, name: str) -> Path | None:
        """The file at this path below the folder, or None."""
        if self.pattern is not None:
            return existing(self.root, self.pattern.replace("{name}", name))
        place = PurePosixPath(name).parent.as_posix()
        if place not in self.listed:  # of several links to one folder, the search took the first
            self.listed.add(place)
            self._list(self.folder / place, files_below(self.folder / place).values())
        return self._only(name, self.by_place.get(name, []))

    def find(self, name: str) -> Path | None:
        """The file at this path, else the only file of this name, else None."""
        found = self.exact(name)
        if found is not None or self.pattern is not None:
            return found
        if name.startswith(self.prefix):
            return self.exact(name.removeprefix(self.prefix))
        return self._only(name, self.by_base.get(name, []))

    def place(self, path: Path) -> str | None:
        """The path below the folder by which `exact` finds a file; None for files elsewhere."""
        if self.pattern is not None or not path.is_relative_to(self.folder):
            return None
        return self._below(path.with_suffix(""))

    def missing(self, name: str) -> str:
        if self.pattern is not None:
            return f"{self.root / self.pattern.replace('{name}', name)} does not exist ({self.key})"
        other = self.unread.get(name) or self.unread.get(name.removeprefix(self.prefix))
        if other is not None:
            return f"{other} cannot be used: {why_unread(other, self.suffixes)}"
        return f"no {name} with suffix {', '.join(self.suffixes)} below {self.folder} ({self.key})"

    def _below(self, path: Path) -> str:
        return composed(path.relative_to(self.folder).as_posix())

    def _only(self, name: str, found: list[Path]) -> Path | None:
        if len(found) > 1 and len({os.path.realpath(path) for path in found}) > 1:
            raise InputError(f"{self.key}: {name} could be {found[0]} or {found[1]}")
        return found[0] if found else None
