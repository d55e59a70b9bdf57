"""Lists and the files that they name: Unicode forms, separators, links, files that cannot be used."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prcl_fast.config import DataConfig
from prcl_fast.data.source import Source
from prcl_fast.data.sources import build_source
from prcl_fast.data.sources.splits import read_split
from prcl_fast.errors import InputError

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Übung é") for form in ("NFC", "NFD"))


def put(path: Path, colour: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 6), colour, np.uint8)).save(path)


def data_set(root: Path, labeled: str, val: str = "v", kind: str = "folder", **changes: Any) -> Source:
    """A data set with one labeled and one validation image; image and label of `v` are there."""
    if kind == "folder":
        put(root / "images/v.png")
        put(root / "labels/v.png")
        changes["classes"] = ["x", "y"]
    lists = {}
    for subset, text in (("labeled", labeled), ("val", val)):
        lists[subset] = root / f"{subset}.txt"
        lists[subset].write_text(text + "\n")
    return build_source(DataConfig(**{"kind": kind, "root": root, **lists, **changes}))


@pytest.mark.parametrize("listed", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("on_disk", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize(
    "line", ["{0}", "{0}/{0}", "images/{0}/{0}.png", "images/{0}/{0}.png labels/{0}/{0}.png"]
)
def test_unicode_forms_of_a_name_are_equal(tmp_path: Path, line: str, on_disk: str, listed: str) -> None:
    put(tmp_path / f"images/{on_disk}/{on_disk}.png", 7)
    put(tmp_path / f"labels/{on_disk}/{on_disk}.png", 1)
    source = data_set(tmp_path, line.format(listed))
    (name,) = source.splits["labeled"].names
    assert unicodedata.is_normalized("NFC", name)
    assert (source.image(name)[0, 0, 0], source.label(name)[0, 0]) == (7, 1)


@pytest.mark.parametrize("listed", [COMPOSED, DECOMPOSED])
def test_unicode_forms_are_equal_in_patterns_and_in_voc(tmp_path: Path, listed: str) -> None:
    put(tmp_path / f"{DECOMPOSED}/photo.png", 7)
    put(tmp_path / f"{DECOMPOSED}/mask.png", 1)
    put(tmp_path / "v/photo.png")
    put(tmp_path / "v/mask.png")
    source = data_set(tmp_path, listed, images="{name}/photo.png", labels="{name}/mask.png")
    assert source.label(COMPOSED)[0, 0] == 1
    for name in ("v", DECOMPOSED):
        put(tmp_path / f"voc/JPEGImages/{name}.png", 7)
        put(tmp_path / f"voc/SegmentationClass/{name}.png", 1)
    source = data_set(tmp_path / "voc", listed, kind="voc")
    assert (source.image(COMPOSED)[0, 0, 0], source.label(COMPOSED)[0, 0]) == (7, 1)


def test_one_name_in_two_unicode_forms_is_a_duplicate(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"{COMPOSED}\n{DECOMPOSED}\n")
    with pytest.raises(InputError, match=r"a\.txt:2: .* is duplicated; first in line 1"):
        read_split(tmp_path / "a.txt")


@pytest.mark.parametrize(
    "line", [r"sub\a", r"images\sub\a.png", r".\images\sub\a.png", r"images\sub\a.png labels\sub\a.png"]
)
def test_backslashes_are_read_as_slashes(tmp_path: Path, line: str) -> None:
    put(tmp_path / "images/sub/a.png")
    put(tmp_path / "labels/sub/a.png", 1)
    source = data_set(tmp_path, line + "\r", images=".\\images", labels="labels")
    assert source.label(source.splits["labeled"].names[0])[0, 0] == 1


@pytest.mark.parametrize("line", ["images/a.png,labels/a.png", "images/a.png; labels/a.png", "a,b"])
def test_a_row_of_a_table_is_told_how_paths_are_separated(tmp_path: Path, line: str) -> None:
    put(tmp_path / "images/a.png")
    put(tmp_path / "labels/a.png")
    with pytest.raises(InputError, match=r"labeled\.txt:1: .*separated by a space or tab, not '[,;]'"):
        data_set(tmp_path, line)
    with pytest.raises(InputError, match=r"labeled\.txt:2: .*separated by a space or tab, not ','"):
        data_set(tmp_path, "image\nimages/a.png,labels/a.png")


def test_a_name_with_a_comma_is_a_name(tmp_path: Path) -> None:
    put(tmp_path / "images/a, b.png")
    put(tmp_path / "labels/a, b.png", 1)
    assert data_set(tmp_path, "a, b").label("a, b")[0, 0] == 1


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("labels/a.jpg", "a", r"labels/a\.jpg cannot be used: a lossy format alters ids; masks are \.png"),
        ("labels/a.gif", "a", r"labels/a\.gif cannot be used: programs that write GIF .*; masks are \.png"),
        ("labels/a.ppm", "a", r"labels/a\.ppm cannot be used: it is not read; masks are \.png"),
        ("images/b.heic", "b", r"images/b\.heic cannot be used: images are \.jpg"),
        ("images/b.gif", "b.gif", r"images/b\.gif cannot be used: images are \.jpg"),
        ("images/sub/b.avif", "images/sub/b.avif", r"images/sub/b\.avif cannot be used"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, file: str, line: str, message: str) -> None:
    put(tmp_path / "images/a.png")
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(InputError, match=message):
        data_set(tmp_path, line)


@pytest.mark.parametrize(
    ("suffix", "reason"), [("jpg", "a JPEG file; a lossy"), ("gif", "a GIF file; programs")]
)
def test_a_mask_of_a_line_of_two_paths_is_named_with_the_reason(
    tmp_path: Path, suffix: str, reason: str
) -> None:
    put(tmp_path / "images/a.png")
    put(tmp_path / f"labels/a.{suffix}")
    source = data_set(tmp_path, f"images/a.png labels/a.{suffix}")
    with pytest.raises(InputError, match=rf"labels/a\.{suffix}: {reason}"):
        source.label("images/a")


def test_a_folder_that_two_links_lead_to_has_the_names_of_both(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere/a.png", 7)
    for link in ("images/p", "images/q", "labels/p", "labels/q"):
        (tmp_path / link).parent.mkdir(exist_ok=True)
        (tmp_path / link).symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    for name in ("p/a", "q/a", "images/q/a.png", "a"):
        source = data_set(tmp_path, name)
        assert source.image(source.splits["labeled"].names[0])[0, 0, 0] == 7


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_validation_image_that_is_a_link_to_a_labeled_one_is_refused(tmp_path: Path, link: Any) -> None:
    for folder in ("images", "labels"):
        put(tmp_path / folder / "a.png", 1)
        put(tmp_path / folder / "b.png", 1)
    (tmp_path / "images/b.png").unlink()
    link(tmp_path / "images/a.png", tmp_path / "images/b.png")
    with pytest.raises(InputError, match=r"val\.txt:1: .*b\.png is .* labeled\.txt:1|b\.png .*the same file"):
        data_set(tmp_path, "a", "b")


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    put(tmp_path / "images/a.png", 7)
    put(tmp_path / "labels/a.png", 1)
    for hidden in ("images/._a.png", "images/.thumbnails/a.png", "labels/.ipynb_checkpoints/a.png"):
        put(tmp_path / hidden)
    assert data_set(tmp_path, "a").image("a")[0, 0, 0] == 7


EXTRA = "troisdorf_000000_000000"


def cities(root: Path) -> None:
    for part, name in (("train", "ulm_000000_000000"), ("val", "lindau_000000_000000")):
        city = name.split("_")[0]
        put(root / f"leftImg8bit/{part}/{city}/{name}_leftImg8bit.png")
        put(root / f"gtFine/{part}/{city}/{name}_gtFine_labelTrainIds.png")
    put(root / f"leftImg8bit/train_extra/troisdorf/{EXTRA}_leftImg8bit.png", 7)


@pytest.mark.parametrize("line", [EXTRA, f"leftImg8bit/train_extra/troisdorf/{EXTRA}_leftImg8bit.png"])
def test_train_extra_of_cityscapes_has_unlabeled_images(tmp_path: Path, line: str) -> None:
    cities(tmp_path)
    (tmp_path / "unlabeled.txt").write_text(line)
    lists = ("ulm_000000_000000", "lindau_000000_000000")
    source = data_set(tmp_path, *lists, kind="cityscapes", unlabeled=tmp_path / "unlabeled.txt")
    assert source.image(EXTRA)[0, 0, 0] == 7
    with pytest.raises(InputError, match=r"labeled\.txt:1: no label .*train_extra have coarse labels alone"):
        data_set(tmp_path, EXTRA, lists[1], kind="cityscapes")
