"""A user's data set: two folders of images and labels, or two path patterns with {name}."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
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
from prcl_fast.data.sources.images import IMAGE_SUFFIXES, MASK_SUFFIXES
from prcl_fast.data.sources.labels import LabelDecoder, label_decoder
from prcl_fast.data.sources.splits import Entry, check_inside
from prcl_fast.data.sources.voc import voc_palette
from prcl_fast.errors import InputError

_MOST_LINKS = 1000  # to one folder; links between links multiply


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
        if entry.image is not None and os.path.isfile(self.root / entry.image):
            return self.root / entry.image
        return None if entry.label is not None else self.images.find(entry.name)

    def label(self, entry: Entry, image: Path) -> LabelFile | None:
        path: Path | None
        if entry.label is not None:
            path = self.root / entry.label
            path = path if os.path.isfile(path) else None
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
        check_inside(where, key)
        self.root, self.suffixes, self.key = root, suffixes, key
        self.pattern = where if "{name}" in where else None
        self.folder = root / where
        # Files by path without suffix, and by bare name.
        self.by_place: defaultdict[str, list[Path]] = defaultdict(list)
        self.by_base: defaultdict[str, list[Path]] = defaultdict(list)
        if self.pattern is None:
            if not os.path.isdir(self.folder):
                raise InputError(f"{self.folder}: no such folder ({key})")
            self._list()

    def _list(self) -> None:
        # Links can lead to one folder by several paths, all of which names may use, and form a circle.
        above: dict[str, frozenset[str]] = {str(self.folder): frozenset()}
        visits: Counter[str] = Counter()
        for folder, subfolders, files in os.walk(self.folder, followlinks=True):
            real, parents = os.path.realpath(folder), above.pop(folder)
            if real in parents:
                subfolders.clear()
                continue
            visits[real] += 1
            if visits[real] > _MOST_LINKS:
                raise InputError(f"{real}: more than {_MOST_LINKS} links lead to this folder ({self.key})")
            above |= {os.path.join(folder, below): parents | {real} for below in subfolders}
            for file in files:
                stem, suffix = os.path.splitext(file)
                if suffix.lower() in self.suffixes and not file.startswith("."):
                    path = Path(folder, file)
                    self.by_place[(path.parent / stem).relative_to(self.folder).as_posix()].append(path)
                    self.by_base[stem].append(path)

    def exact(self, name: str) -> Path | None:
        """The file at this path below the folder, or None."""
        if self.pattern is not None:
            path = self.root / self.pattern.replace("{name}", name)
            return path if os.path.isfile(path) else None
        return self._only(name, self.by_place.get(name, []))

    def find(self, name: str) -> Path | None:
        """The file at this path, else the only file of this name, else None."""
        found = self.exact(name)
        if found is not None or self.pattern is not None:
            return found
        below = self.folder.relative_to(self.root).as_posix() + "/"
        if name.startswith(below):
            return self.exact(name.removeprefix(below))
        return self._only(name, self.by_base.get(name, []))

    def place(self, path: Path) -> str | None:
        """The path below the folder by which `exact` finds a file; None for files elsewhere."""
        if self.pattern is not None or not path.is_relative_to(self.folder):
            return None
        return PurePosixPath(path.relative_to(self.folder).as_posix()).with_suffix("").as_posix()

    def missing(self, name: str) -> str:
        if self.pattern is not None:
            return f"{self.root / self.pattern.replace('{name}', name)} does not exist ({self.key})"
        return f"no {name} with suffix {', '.join(self.suffixes)} below {self.folder} ({self.key})"

    def _only(self, name: str, found: list[Path]) -> Path | None:
        if len(found) > 1 and len({os.path.realpath(path) for path in found}) > 1:
            raise InputError(f"{self.key}: {name} could be {found[0]} or {found[1]}")
        return found[0] if found else None
