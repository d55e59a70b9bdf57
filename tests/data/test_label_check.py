"""The verdict on the labels of a data set: refusals before training, and notes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prcl_fast.config import DataConfig
from prcl_fast.data.sources import build_source
from prcl_fast.data.tools.label_check import check_labels
from prcl_fast.errors import InputError

LABELED, VAL = ("l0", "l1"), ("v0", "v1")
Check = Callable[..., tuple[str, ...]]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Checks a data set of four grey masks of one row each: rows of l0, l1, v0, v1, and keys of `data`."""
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for subset, names in (("labeled", LABELED), ("val", VAL)):
        (tmp_path / f"{subset}.txt").write_text("\n".join(names))

    def run(*rows: list[int], classes: str = "abc", **keys: object) -> tuple[str, ...]:
        for name, row in zip((*LABELED, *VAL), rows, strict=True):
            pixels = np.array([row], dtype=np.uint8)
            Image.new("RGB", (len(row), 1)).save(tmp_path / f"images/{name}.png")
            if not (tmp_path / f"labels/{name}.png").exists() or not keys.get("palette"):
                Image.fromarray(pixels).save(tmp_path / f"labels/{name}.png")
        data = {"kind": "folder", "root": tmp_path, "classes": list(classes)}
        splits = {subset: tmp_path / f"{subset}.txt" for subset in ("labeled", "val")}
        return check_labels(build_source(DataConfig(**data, **splits, **keys)))

    return run


WHOLE = [0, 1, 2, 0]


def test_whole_labels_have_no_note(check: Check) -> None:
    assert check(WHOLE, WHOLE, WHOLE, WHOLE) == ()
    assert check([0, 1, 2, 255], WHOLE, [0, 1, 0, 0], WHOLE) == ()


def test_binary_masks_of_0_and_255_are_refused_with_the_remedy(check: Check) -> None:
    mask = [0, 0, 0, 255]
    message = (
        r"data\.labeled: no pixel of these images has class b, and 25\.0 % of the pixels are not labeled; "
        r"ids in the files: 0 \(75\.0 %\), 255 \(25\.0 %\), the first is .*l0\.png; if id 255 means b: "
        r"data\.label_map: \{255: 1\}"
    )
    with pytest.raises(InputError, match=message):
        check(mask, mask, mask, mask, classes="ab")
    assert check(mask, mask, mask, mask, classes="ab", label_map={255: 1}) == ()
    with pytest.raises(InputError, match=r"data\.val: no pixel of these images has class b.*v0\.png"):
        check([0, 1, 0, 1], [0, 1, 0, 1], mask, mask, classes="ab")


def test_images_without_a_labeled_pixel_are_refused(check: Check) -> None:
    nothing = [255] * 4
    with pytest.raises(
        InputError, match=r"data\.labeled: no pixel of these images has a label; ids .*255 \(100"
    ):
        check(nothing, nothing, WHOLE, WHOLE)
    with pytest.raises(
        InputError, match=r"data\.val: no pixel of these images has a label; .*0 \(100\.0 %\)"
    ):
        check([0, 1, 2, 3], [1, 2, 3, 3], [0, 0], [0, 0], ignore=0, label_map={1: 0, 2: 1, 3: 2})


def test_a_class_that_is_nowhere_beside_mostly_unlabeled_pixels_is_refused(check: Check) -> None:
    mask = [0, 1, 255, 255, 255]
    with pytest.raises(InputError, match=r"has class c, and 60\.0 % .*data\.label_map: \{255: 2\}"):
        check(mask, mask, mask, mask)


def test_sparse_labels_may_lack_classes(check: Check) -> None:
    mask = [0, 1, 255, 255, 255]
    (note,) = check(mask, mask, WHOLE, WHOLE)  # the validation images have class c, so it is read
    assert note.startswith(
        "data.labeled: no pixel of these images has class c, and 60.0 % of the pixels are not labeled, "
        "although those of data.val have class c"
    )
    notes = check(mask, mask, mask, mask, classes="abcdef")
    assert [note.partition(":")[0] for note in notes] == ["data.labeled", "data.val"]


def test_mostly_unlabeled_pixels_of_all_classes_are_a_note(check: Check) -> None:
    (note,) = check([0, 1, 2, 255, 255, 255, 255], [255, 255], WHOLE, WHOLE)
    assert note.startswith(
        "data.labeled: 66.7 % of the pixels are not labeled; ids in the files: 0 (11.1 %), 1"
    )


def test_labeled_images_of_a_single_class_are_refused(check: Check) -> None:
    with pytest.raises(
        InputError, match=r"data\.labeled: .* has the classes b, c, so there is nothing to tell"
    ):
        check([0, 0], [0, 0], WHOLE, WHOLE)
    (note,) = check(WHOLE, WHOLE, [0, 0], [0, 0])
    assert note == "data.val: no pixel of these images has the classes b, c"


def test_a_missing_class_alone_is_a_note_that_says_where_it_occurs(check: Check) -> None:
    few = [0, 1, 0, 1]
    (note,) = check(few, few, WHOLE, WHOLE)
    assert (
        note == "data.labeled: no pixel of these images has class c, although those of data.val have class c"
    )
    (note,) = check([*few, 255], few, few, few)
    assert note == (
        "data.labeled: no pixel of these images has class c; if id 255 means c: data.label_map: {255: 2}"
    )


def put_palette_mask(path: Path, indices: list[int], palette: list[tuple[int, int, int]]) -> None:
    image = Image.fromarray(np.array([indices], dtype=np.uint8))
    image.putpalette([value for colour in palette for value in colour])
    image.save(path)


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def test_palettes_in_another_order_are_refused(tmp_path: Path, check: Check) -> None:
    check(WHOLE, WHOLE, WHOLE, WHOLE)
    keys = {"kind": "folder", "root": tmp_path, "classes": list("abc")}
    source = build_source(DataConfig(**keys, labeled=tmp_path / "labeled.txt", val=tmp_path / "val.txt"))
    for name in (*LABELED, *VAL):
        put_palette_mask(tmp_path / f"labels/{name}.png", WHOLE, [RED, GREEN, BLUE])
    assert check_labels(source) == ()
    put_palette_mask(tmp_path / "labels/l1.png", WHOLE, [RED, GREEN, (1, 2, 3)])
    (note,) = check_labels(source)
    assert "l1.png: index 2 is colour (1, 2, 3)" in note
    put_palette_mask(tmp_path / "labels/v0.png", [2, 1, 0, 2], [BLUE, GREEN, RED])
    with pytest.raises(InputError, match=r"v0\.png: \(0, 0, 255\) is index 0, but 2 in .*l0\.png: .*palette"):
        check_labels(source)


def test_a_grey_mask_beside_masks_of_colours_must_mean_one_thing(tmp_path: Path, check: Check) -> None:
    palette = [[255, 255, 255], [0, 0, 0], [255, 0, 0]]
    check(WHOLE, WHOLE, WHOLE, WHOLE)
    colours = np.array([[palette[index] for index in WHOLE]], dtype=np.uint8)
    for name in LABELED:
        Image.fromarray(colours).save(tmp_path / f"labels/{name}.png")
    assert check(WHOLE, WHOLE, WHOLE, WHOLE, palette=palette) == ()
    Image.fromarray(np.array([[0, 255, 0, 0]], dtype=np.uint8)).save(tmp_path / "labels/v1.png")
    with pytest.raises(InputError, match=r"v1\.png: a grey mask with id 0, whose colour is another class"):
        check(WHOLE, WHOLE, WHOLE, WHOLE, palette=palette)
