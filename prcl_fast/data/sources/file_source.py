"""A data set of files on disk; base of VOC, Cityscapes and folders of images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from prcl_fast.config import DataConfig
from prcl_fast.config.files import plain_path
from prcl_fast.data.source import SUBSETS, Split
from prcl_fast.data.sources.images import READING, Header, check_pair, read_header, read_image
from prcl_fast.data.sources.labels import LabelContent, LabelDecoder
from prcl_fast.data.sources.splits import (
    Entry,
    SplitFile,
    check_disjoint,
    make_split,
    read_split,
    separator_hint,
)
from prcl_fast.errors import InputError, naming
from prcl_fast.files.reading import file_digest, read_text

_MAX_BYTES = 2**20


@dataclass(frozen=True)
class LabelFile:
    """A label file and its decoder."""

    path: Path
    decoder: LabelDecoder


class Layout(Protocol):
    """The layout of a data set: the files of each entry of a split."""

    def image(self, entry: Entry) -> Path | None:
        """The existing image of an entry, or None."""

    def label(self, entry: Entry, image: Path) -> LabelFile | None:
        """The existing label of an entry whose image was found, or None."""

    def missing_image(self, entry: Entry) -> str:
        """The missing file, for a message."""

    def missing_label(self, entry: Entry) -> str:
        """The missing file, for a message."""


@dataclass(frozen=True, eq=False)
class FileSource:
    """A data set whose files all exist. Implements `prcl_fast.data.source.Source`.

    Attributes:
        classes: C names in the order of their ids.
        palette: uint8 [C, 3].
        splits: the subsets "labeled", "unlabeled" and "val".
        images: path of every image.
        labels: label of every labeled and validation image, and of unlabeled images if they have one.
        max_pixels: bound on the pixels of one image or label.
    """

    classes: tuple[str, ...]
    palette: np.ndarray
    splits: Mapping[str, Split]
    images: Mapping[str, Path]
    labels: Mapping[str, LabelFile]
    max_pixels: int

    def image(self, name: str) -> np.ndarray:
        """uint8 [H, W, 3], RGB. Raises InputError that names the file."""
        return read_image(self.images[name], self.max_pixels)

    def header(self, name: str) -> Header:
        """Size and EXIF orientation of an image, undecoded. Raises InputError that names the file."""
        return read_header(self.images[name], self.max_pixels)

    def label(self, name: str) -> np.ndarray:
        """Class ids uint8 [H, W], 255 where not labeled.

        Raises:
            InputError: the label cannot be read, or differs in size from the image.
        """
        file = self._label_file(name)
        label = file.decoder.read(file.path, self.max_pixels)
        check_pair(self.images[name], self.header(name), file.path, label.shape)
        return label

    def label_content(self, name: str) -> LabelContent:
        """The ids in the file of a label. Raises InputError as `label` does."""
        file = self._label_file(name)
        size, content = file.decoder.read_content(file.path, self.max_pixels)
        check_pair(self.images[name], self.header(name), file.path, size)
        return content

    def _label_file(self, name: str) -> LabelFile:
        file = self.labels.get(name)
        if file is None:
            raise InputError(f"{self.images[name]}: this unlabeled image has no label file")
        return file

    def pixel_state(self, name: str, labeled: bool) -> str:
        """Path, size and times of change of the image, and of its label with the decoder's fingerprint.

        Begins with the number of the way in which files are read.
        """
        state = f"{READING} {_file_state(self.images[name])}"
        if labeled:
            file = self.labels[name]
            state += f" {_file_state(file.path)} {file.decoder.fingerprint}"
        return state

    def content(self, name: str, labeled: bool, *, whole: bool) -> str:
        """Size of the image file, and of the label file with its decoder; with `whole` digests, too."""
        if not labeled:
            return _file_content(self.images[name], whole)
        file = self.labels[name]
        label = f"{_file_content(file.path, whole)} {file.decoder.fingerprint}"
        return f"{_file_content(self.images[name], whole)} {label}"


def _file_content(path: Path, whole: bool) -> str:
    size = str(_state_of(path).st_size)
    return f"{size} {file_digest(path, 'file')}" if whole else size


def _file_state(path: Path) -> str:
    state = _state_of(path)
    # Nobody can set the time of the last change of state, as `cp -p` sets that of the last modification.
    return f"{path.absolute()} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"


def _state_of(path: Path) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def locate_files(data: DataConfig, classes: Sequence[str], palette: np.ndarray, layout: Layout) -> FileSource:
    """Reads the split files of the configuration and finds all images and labels in them.

    Raises:
        InputError: a split file is wrong, two subsets have an image in common, or an image or label is
            missing; the message names the split file and its line.
    """
    paths = {"labeled": data.labeled, "unlabeled": data.unlabeled, "val": data.val}
    files = {}
    for subset, path in paths.items():
        if path is not None:
            with naming(f"data.{subset}"):
                files[subset] = read_split(path)
    check_disjoint(list(files.values()))
    images: dict[str, Path] = {}
    labels: dict[str, LabelFile] = {}
    for subset, file in files.items():
        missing: list[str] = []
        for entry in file.entries:
            where = f"{file.path}:{entry.line}"
            image = layout.image(entry)
            if image is None:
                missing.append(f"{where}: no image for {entry.name}: {layout.missing_image(entry)}")
                missing[-1] += separator_hint(entry.text)
                continue
            images[entry.name] = image
            label = layout.label(entry, image)
            if label is not None:
                labels[entry.name] = label
            elif subset != "unlabeled":
                missing.append(f"{where}: no label for {entry.name}: {layout.missing_label(entry)}")
                missing[-1] += separator_hint(entry.text)
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise InputError(missing[0] + more)
    _check_no_image_twice(files, images)
    splits = {subset: files[subset].split if subset in files else make_split((), "ids") for subset in SUBSETS}
    return FileSource(tuple(classes), palette, splits, images, labels, data.max_pixels)


def _check_no_image_twice(files: Mapping[str, SplitFile], images: Mapping[str, Path]) -> None:
    # Different ids can lead to one file, such as "0001" and "train/0001", or by links. A link may repeat an
    # image within a subset, but not lead from one subset into another.
    seen: dict[Path, str] = {}
    linked: dict[tuple[int, int], tuple[str, Path, str]] = {}
    for subset, file in files.items():
        for entry in file.entries:
            where = f"{file.path}:{entry.line}"
            image = images[entry.name]
            if image in seen:
                raise InputError(f"{where}: {image} is already named by {seen[image]}")
            seen[image] = where
            try:
                state = os.stat(image)
            except OSError:  # the decoder reports it
                continue
            inode = (state.st_dev, state.st_ino)
            other_subset, other, other_where = linked.setdefault(inode, (subset, image, where))
            if other_subset != subset and state.st_ino:  # some file systems number every file 0
                raise InputError(
                    f"{where}: {image} is by a link the same file as {other}, which {other_where} names"
                )


def class_names(classes: list[str] | Path | None, default: Sequence[str]) -> tuple[str, ...]:
    """The class names of the key `data.classes`: a list, or a text file with one name a line.

    Raises:
        InputError: unreadable, fewer than 2 or more than 255 names, or a name twice; names the file or key.
    """
    if classes is None:
        return tuple(default)
    where = "data.classes" if isinstance(classes, list) else f"data.classes: {classes}"
    if isinstance(classes, list):
        names = [name.strip() for name in classes]
    else:
        with naming("data.classes"):
            text = read_text(classes, "file of class names", _MAX_BYTES)
        names = [line.strip() for line in text.split("\n") if line.strip()]
    if not 2 <= len(names) <= 255:
        raise InputError(f"{where}: {len(names)} classes; 2 to 255 are possible")
    twice = [name for position, name in enumerate(names) if name in names[:position]]
    if twice or "" in names:
        raise InputError(
            f"{where}: {f'class {twice[0]!r} is duplicated' if twice else 'a class has no name'}"
        )
    return tuple(names)


def class_palette(
    palette: Sequence[Sequence[int]] | None, num_classes: int, default: np.ndarray
) -> np.ndarray:
    """uint8 [C, 3] from the key `data.palette`. Raises InputError if it has too few colours."""
    colours = default if palette is None else np.array(palette, dtype=np.uint8)
    if len(colours) < num_classes:
        raise InputError(f"data.palette: {len(colours)} colours for {num_classes} classes")
    return colours[:num_classes].copy()


def data_root(data: DataConfig) -> Path:
    """The folder `data.root` in the spelling that caches use. Raises InputError if it does not exist."""
    assert data.root is not None  # the configuration requires it for every kind with files
    if not os.path.isdir(data.root):
        raise InputError(f"{data.root}: no such folder (data.root)")
    return plain_path(data.root)
