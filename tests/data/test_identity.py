"""The identity of a data set: what changes it, and what does not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prcl_fast.config import DataConfig, SyntheticConfig
from prcl_fast.data.identity import changed_data, data_identity
from prcl_fast.data.source import Source
from prcl_fast.data.sources import build_source
from prcl_fast.data.sources.synthetic import write_synthetic
from prcl_fast.errors import InputError

CLASSES = ["background", "disc", "square", "triangle", "ring", "cross"]


def source_of(folder: Path, **data: Any) -> Source:
    tree = {subset: folder / f"splits/{subset}.txt" for subset in ("labeled", "unlabeled", "val")}
    tree |= {"kind": "voc", "root": folder, "classes": CLASSES, "label_map": {254: 255}}
    return build_source(DataConfig.model_validate(tree | data))


def identity(folder: Path, **data: Any) -> dict[str, str]:
    return data_identity(source_of(folder, **data))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_synthetic(tmp_path / "a", SyntheticConfig(size=[64, 64], labeled=4, unlabeled=4, val=2))
    return tmp_path / "a"


def test_a_copy_elsewhere_at_another_time_is_the_same_data(folder: Path) -> None:
    copy = folder.parent / "b"
    shutil.copytree(folder, copy)
    for file in copy.rglob("*.png"):
        os.utime(file, (1, 1))
    assert identity(folder) == identity(copy)


def _lines_reversed(folder: Path) -> None:
    file = folder / "splits/labeled.txt"
    file.write_text("".join(f"{line}\n" for line in reversed(file.read_text().split())))


def _line_dropped(folder: Path) -> None:
    file = folder / "splits/unlabeled.txt"
    file.write_text("".join(f"{line}\n" for line in file.read_text().split()[1:]))


def _swapped(where: str, subset: str) -> Callable[[Path], None]:
    def swap(folder: Path) -> None:
        one, two, *_ = (folder / "splits" / f"{subset}.txt").read_text().split()
        files = {file.stem: file for file in (folder / where).iterdir()}
        first = files[one].read_bytes()
        files[one].write_bytes(files[two].read_bytes())
        files[two].write_bytes(first)

    return swap


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("data.labeled", _lines_reversed),
        ("data.unlabeled", _line_dropped),
        ("files of data.labeled", _swapped("JPEGImages", "labeled")),
        ("files of data.unlabeled", _swapped("JPEGImages", "unlabeled")),
        ("files of data.val", _swapped("SegmentationClass", "val")),
    ],
)
def test_a_change_is_named(part: str, change: Callable[[Path], None], folder: Path) -> None:
    before = identity(folder)
    change(folder)
    assert changed_data(before, identity(folder)).startswith(f"{part}: ")
    assert changed_data(before, before) == ""


def test_the_order_of_classes_counts(folder: Path) -> None:
    other = ["background", "square", "disc", "triangle", "ring", "cross"]
    assert changed_data(identity(folder), identity(folder, classes=other)).startswith("data.classes: ")


def test_the_map_of_labels_counts(folder: Path) -> None:
    other = identity(folder, label_map={254: 255, 5: 4})
    assert changed_data(identity(folder), other).startswith("files of data.labeled: ")


def test_a_file_that_is_gone_is_named(folder: Path) -> None:
    source = source_of(folder)
    name = source.splits["val"].names[0]
    next((folder / "JPEGImages").glob(f"{name}.*")).unlink()
    with pytest.raises(InputError, match=name):
        data_identity(source)


def test_long_lists_of_classes_are_shown_around_their_difference() -> None:
    names = [f"class{index}" for index in range(150)]
    former, now = ({"data.classes": ", ".join(listed)} for listed in (names, [*names[:120], "other"]))
    message = changed_data(former, now)
    assert "class120, class121" in message
    assert "other here" in message
    assert len(message) < 400
