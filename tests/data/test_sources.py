"""Data sets on disk: all layouts, and one line with the file name for every bad file."""

from __future__ import annotations

import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prcl_fast.config import DataConfig
from prcl_fast.data.source import Source
from prcl_fast.data.sources import build_source, cityscapes, voc
from prcl_fast.data.sources.images import read_image, read_mask, save_index_png
from prcl_fast.errors import InputError

SIZE = (4, 6)  # height, width


def put_image(path: Path, colour: tuple[int, int, int] = (10, 200, 90), size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], colour).save(path)


def put_label(path: Path, values: Any = 1, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    label = np.broadcast_to(np.asarray(values, dtype=np.uint8), size)
    Image.fromarray(np.ascontiguousarray(label)).save(path)


def put_splits(folder: Path, labeled: str, unlabeled: str | None, val: str) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for name, text in (("labeled", labeled), ("unlabeled", unlabeled), ("val", val)):
        if text is not None:
            splits[name] = folder / f"{name}.txt"
            splits[name].write_text(text + "\n")
    return splits


def voc_tree(root: Path, masks: str = "SegmentationClassAug") -> None:
    for name in ("2007_000001", "2007_000002", "2007_000003"):
        put_image(root / "JPEGImages" / f"{name}.jpg")
    for name in ("2007_000001", "2007_000003"):
        save_index_png(root / masks / f"{name}.png", np.full(SIZE, 20, np.uint8), voc.voc_palette(21))


def voc_config(tmp_path: Path, **changes: Any) -> DataConfig:
    splits = put_splits(tmp_path / "splits", "2007_000001", "2007_000002", "2007_000003")
    return DataConfig(**{"kind": "voc", "root": tmp_path, **splits, **changes})


@pytest.mark.parametrize("below", ["", "VOC2012", "VOCdevkit/VOC2012"])
@pytest.mark.parametrize("masks", ["SegmentationClassAug", "SegmentationClass"])
def test_voc_is_found_in_all_its_places(tmp_path: Path, below: str, masks: str) -> None:
    voc_tree(tmp_path / below, masks)
    source = build_source(voc_config(tmp_path))
    assert source.splits["unlabeled"].names == ("2007_000002",)
    image, label = source.image("2007_000001"), source.label("2007_000001")
    assert (image.shape, image.dtype) == ((*SIZE, 3), np.uint8)
    assert (label.shape, label.dtype) == (SIZE, np.uint8)
    assert (label == 20).all()
    assert image.flags.writeable
    assert label.flags.writeable


def test_voc_prefers_the_augmented_masks(tmp_path: Path) -> None:
    voc_tree(tmp_path)
    put_label(tmp_path / "SegmentationClass/2007_000001.png", 3)
    assert build_source(voc_config(tmp_path)).label("2007_000001")[0, 0] == 20


def test_voc_has_its_names_and_colours(tmp_path: Path) -> None:
    voc_tree(tmp_path)
    source = build_source(voc_config(tmp_path))
    assert (len(source.classes), source.classes[15]) == (21, "person")
    expected = {0: (0, 0, 0), 1: (128, 0, 0), 3: (128, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    for index, colour in expected.items():
        assert tuple(source.palette[index]) == colour


def test_every_public_form_of_a_split_leads_to_the_same_voc_files(tmp_path: Path) -> None:
    voc_tree(tmp_path)
    config = voc_config(tmp_path)
    config.labeled.write_text("JPEGImages/2007_000001.jpg SegmentationClass/2007_000001.png\r\n")
    assert build_source(config).splits["labeled"].names == ("2007_000001",)


def test_no_unlabeled_split_is_an_empty_one(tmp_path: Path) -> None:
    voc_tree(tmp_path)
    assert build_source(voc_config(tmp_path, unlabeled=None)).splits["unlabeled"].names == ()


def test_a_source_can_be_sent_to_a_worker(tmp_path: Path) -> None:
    voc_tree(tmp_path)
    source: Source = pickle.loads(pickle.dumps(build_source(voc_config(tmp_path))))
    assert source.label("2007_000003")[0, 0] == 20


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("JPEGImages/2007_000002.jpg", r"unlabeled\.txt:1: no image for 2007_000002: .*2007_000002\.jpg"),
        ("JPEGImages/2007_000003.jpg", r"val\.txt:1: no image for 2007_000003"),
        ("SegmentationClassAug/2007_000001.png", r"labeled\.txt:1: no label for 2007_000001"),
    ],
)
def test_a_missing_file_names_the_split_and_its_line(tmp_path: Path, lost: str, message: str) -> None:
    voc_tree(tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(InputError, match=message):
        build_source(voc_config(tmp_path))


def test_an_image_in_two_subsets_is_refused(tmp_path: Path) -> None:
    voc_tree(tmp_path)
    config = voc_config(tmp_path)
    config.val.write_text("2007_000003\n2007_000001\n")
    with pytest.raises(InputError, match=r"val\.txt and .*/labeled\.txt have 1 of their ids in common"):
        build_source(config)


def test_a_root_without_the_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder JPEGImages"):
        build_source(voc_config(tmp_path))
    with pytest.raises(InputError, match=r"data\.root"):
        build_source(voc_config(tmp_path, root=tmp_path / "none"))


def test_an_rgb_mask_of_voc_is_refused_with_the_remedy(tmp_path: Path) -> None:
    voc_tree(tmp_path)
    put_image(tmp_path / "SegmentationClassAug/2007_000001.png")
    with pytest.raises(InputError, match=r"2007_000001\.png: an RGB mask.*prcl data convert"):
        build_source(voc_config(tmp_path)).label("2007_000001")


TRAIN, VAL = "hamburg_000000_080169", "frankfurt_000001_062250"


def city_tree(root: Path, kind: str) -> None:
    for part, name in (("train", TRAIN), ("val", VAL)):
        city = name.split("_")[0]
        put_image(root / f"leftImg8bit/{part}/{city}/{name}_leftImg8bit.png")
        values = [0, 13, 18, 255, 0, 255] if kind == "labelTrainIds" else [7, 26, 33, 0, 7, 6]
        put_label(root / f"gtFine/{part}/{city}/{name}_gtFine_{kind}.png", values)


def city_config(tmp_path: Path, **changes: Any) -> DataConfig:
    splits = put_splits(
        tmp_path / "splits",
        f"leftImg8bit/train/hamburg/{TRAIN}_leftImg8bit.png",
        None,
        f"/images/val/{VAL}.png\t/segmentation/val/{VAL}_gtFine.png",
    )
    return DataConfig(**{"kind": "cityscapes", "root": tmp_path, **splits, **changes})


@pytest.mark.parametrize("kind", ["labelTrainIds", "labelIds"])
def test_cityscapes_gives_training_ids_from_both_kinds_of_labels(tmp_path: Path, kind: str) -> None:
    city_tree(tmp_path, kind)
    source = build_source(city_config(tmp_path))
    for name in (TRAIN, VAL):
        assert source.label(name)[0].tolist() == [0, 13, 18, 255, 0, 255]
    assert source.image(VAL).shape == (*SIZE, 3)
    assert (source.classes[13], tuple(source.palette[13])) == ("car", (0, 0, 142))


def test_cityscapes_label_ids_follow_the_official_table() -> None:
    assert len(cityscapes.LABEL_IDS) == len(cityscapes.CLASSES) == len(cityscapes.PALETTE) == 19
    official = {7: "road", 11: "building", 17: "pole", 24: "person", 26: "car", 31: "train", 33: "bicycle"}
    for label_id, name in official.items():
        assert cityscapes.CLASSES[cityscapes.LABEL_IDS.index(label_id)] == name


def test_cityscapes_in_the_flat_layout(tmp_path: Path) -> None:
    for part, name in (("train", TRAIN), ("val", VAL)):
        put_image(tmp_path / f"images/{part}/{name}.png")
        put_label(tmp_path / f"segmentation/{part}/{name}_gtFine.png", 18)
    assert build_source(city_config(tmp_path)).label(VAL)[0, 0] == 18


def test_a_list_of_cityscapes_test_images_is_told_so(tmp_path: Path) -> None:
    city_tree(tmp_path, "labelIds")
    config = city_config(tmp_path)
    config.val.write_text("munich_000013_000019_leftImg8bit\n")
    with pytest.raises(InputError, match=r"val\.txt:1: .*munich belongs to the test set"):
        build_source(config)


def folder_tree(root: Path) -> None:
    """Images in subfolders, and split lines without the subfolder."""
    for place in ("train/a", "train/b", "val/c"):
        put_image(root / f"images/{place}.jpg")
    put_label(root / "labels/train/a.png", [0, 1, 2, 255, 0, 0])
    put_label(root / "labels/val/c.png", 2)


def folder_config(
    tmp_path: Path, splits: tuple[str, str, str] = ("a", "b", "c"), **changes: Any
) -> DataConfig:
    base = {"kind": "folder", "root": tmp_path, "classes": ["x", "y", "z"]}
    return DataConfig(**{**base, **put_splits(tmp_path / "splits", *splits), **changes})


@pytest.mark.parametrize(
    "splits",
    [
        ("a", "b", "c"),
        ("train/a", "train/b", "val/c"),
        ("images/train/a.jpg", "images/train/b.jpg", "images/val/c.jpg"),
        (
            "images/train/a.jpg labels/train/a.png",
            "images/train/b.jpg no/b.png",
            "images/val/c.jpg labels/val/c.png",
        ),
        ("/images/train/a.jpg\t/labels/train/a.png", "b", "val/c"),
    ],
)
def test_a_folder_is_searched_by_name(tmp_path: Path, splits: tuple[str, str, str]) -> None:
    folder_tree(tmp_path)
    source = build_source(folder_config(tmp_path, splits))
    (labeled,), (unlabeled,) = source.splits["labeled"].names, source.splits["unlabeled"].names
    assert source.label(labeled)[0].tolist() == [0, 1, 2, 255, 0, 0]
    assert source.image(unlabeled).shape == (*SIZE, 3)


def test_patterns_say_where_files_are(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        put_image(tmp_path / f"{name}/photo.JPG.png")
        put_label(tmp_path / f"{name}/mask.png", 1)
    source = build_source(folder_config(tmp_path, images="{name}/photo.JPG.png", labels="{name}/mask.png"))
    assert source.label("c")[0, 0] == 1


@pytest.mark.parametrize("suffix", [".JPG", ".jpeg", ".jpe", ".JFIF", ".png", ".bmp", ".webp", ".tif"])
def test_images_of_all_formats_are_found_and_read(tmp_path: Path, suffix: str) -> None:
    folder_tree(tmp_path)
    (tmp_path / "images/train/b.jpg").unlink()
    put_image(tmp_path / "b.jpg", (250, 250, 250))
    with Image.open(tmp_path / "b.jpg") as image:
        image.save(tmp_path / f"images/train/b{suffix}")
    assert abs(int(build_source(folder_config(tmp_path)).image("b").mean()) - 250) <= 2


def test_a_name_in_two_subfolders_is_ambiguous_unless_written_out(tmp_path: Path) -> None:
    folder_tree(tmp_path)
    put_image(tmp_path / "images/val/a.jpg")
    put_label(tmp_path / "labels/val/a.png", 2)
    with pytest.raises(InputError, match=r"data\.images: a could be .*a\.jpg or .*a\.jpg"):
        build_source(folder_config(tmp_path))
    source = build_source(folder_config(tmp_path, ("train/a", "train/b", "val/a")))
    assert (source.label("train/a")[0, 1], source.label("val/a")[0, 1]) == (1, 2)


def test_two_names_of_one_image_are_refused(tmp_path: Path) -> None:
    folder_tree(tmp_path)
    with pytest.raises(InputError, match=r"unlabeled\.txt:1: .*a\.jpg is already named by .*labeled\.txt:1"):
        build_source(folder_config(tmp_path, ("a", "train/a", "c")))


def test_links_in_a_circle_do_not_trap_the_search(tmp_path: Path) -> None:
    folder_tree(tmp_path)
    (tmp_path / "images/train/loop").symlink_to(tmp_path / "images", target_is_directory=True)
    assert build_source(folder_config(tmp_path)).image("a").shape == (*SIZE, 3)


def test_label_map_and_ignore_turn_ids_on_disk_into_classes(tmp_path: Path) -> None:
    folder_tree(tmp_path)
    put_label(tmp_path / "labels/train/a.png", [0, 1, 2, 9, 255, 40])
    config = folder_config(tmp_path, label_map={1: 0, 2: 1, 9: 2, 40: 255}, ignore=0)
    assert build_source(config).label("a")[0].tolist() == [255, 0, 1, 2, 255, 255]
    with pytest.raises(InputError, match=r"data\.label_map: 1 leads to 3"):
        build_source(folder_config(tmp_path, label_map={1: 3}))


def test_an_id_that_label_map_does_not_name_but_maps_others_to_is_refused(tmp_path: Path) -> None:
    folder_tree(tmp_path)
    put_label(tmp_path / "labels/train/a.png", [0, 7, 8, 255, 7, 7])
    message = r"a\.png: label id 0, which data\.label_map does not name.*add 0: 0 .*or 0: 255"
    with pytest.raises(InputError, match=message):
        build_source(folder_config(tmp_path, label_map={7: 0, 8: 1})).label("a")
    for changes, first in (
        ({"label_map": {7: 0, 8: 1, 0: 0}}, 0),
        ({"label_map": {7: 0, 8: 1, 0: 255}}, 255),
        ({"label_map": {7: 0, 8: 1}, "ignore": 0}, 255),
    ):
        label = build_source(folder_config(tmp_path, **changes)).label("a")[0].tolist()
        assert label == [first, 0, 1, 255, 0, 0]


@pytest.mark.parametrize("kind", ["labelTrainIds", "labelIds"])
def test_cityscapes_refuses_an_id_that_label_map_merges_unsaid(tmp_path: Path, kind: str) -> None:
    city_tree(tmp_path, kind)
    with pytest.raises(InputError, match=r"label id (13|26), .*data\.label_map does not name"):
        build_source(city_config(tmp_path, label_map={14: 13})).label(TRAIN)
    merged = build_source(city_config(tmp_path, label_map={14: 13, 13: 13}))
    assert merged.label(TRAIN)[0].tolist() == [0, 13, 18, 255, 0, 255]


RED_GREEN_BLUE = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def put_palette_label(path: Path, indices: list[int], palette: list[list[int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array([indices] * SIZE[0], dtype=np.uint8))
    image.putpalette([value for colour in palette for value in colour])
    image.save(path)


@pytest.mark.parametrize("kind", ["folder", "voc", "cityscapes"])
def test_with_data_palette_the_colours_of_palette_masks_decide(tmp_path: Path, kind: str) -> None:
    palette = [[0, 0, 255], [255, 0, 0], [0, 255, 0]]  # blue is index 0
    indices = [0, 1, 2, 255, 0, 0]
    if kind == "folder":
        folder_tree(tmp_path)
        config, name, path = folder_config(tmp_path), "a", "labels/train/a.png"
    elif kind == "voc":
        voc_tree(tmp_path)
        config, name = voc_config(tmp_path), "2007_000001"
        path = f"SegmentationClassAug/{name}.png"
    else:
        city_tree(tmp_path, "labelTrainIds")
        config, name = city_config(tmp_path), TRAIN
        path = f"gtFine/train/hamburg/{TRAIN}_gtFine_labelTrainIds.png"
    update = {"classes": ["x", "y", "z"]}
    padded = palette + [[1, 2, 3]] * 252 + [[9, 9, 9]]
    put_palette_label(tmp_path / path, indices, padded)
    by_index = build_source(config.model_copy(update=update))
    by_colour = build_source(config.model_copy(update=update | {"palette": RED_GREEN_BLUE}))
    assert by_index.label(name)[0].tolist() == indices
    assert by_colour.label(name)[0].tolist() == [2, 0, 1, 255, 2, 2]
    put_palette_label(tmp_path / path, [0, 1, 3, 0, 0, 0], padded)
    with pytest.raises(InputError, match=r"id 3 has the colour \(1, 2, 3\), which is not in data\.palette"):
        by_colour.label(name)


def test_grey_masks_are_ids_unless_all_colours_are_greys(tmp_path: Path) -> None:
    folder_tree(tmp_path)
    path = tmp_path / "labels/train/a.png"
    put_label(path, [0, 1, 2, 255, 0, 0])
    assert build_source(folder_config(tmp_path, palette=RED_GREEN_BLUE)).label("a")[0, 3] == 255
    put_label(path, [0, 255, 128, 0, 0, 0])
    greys = folder_config(tmp_path, palette=[[0, 0, 0], [255, 255, 255], [128, 128, 128]])
    assert build_source(greys).label("a")[0].tolist() == [0, 1, 2, 0, 0, 0]
    Image.fromarray(np.array([[False, True] * 3] * SIZE[0])).save(path)
    assert Image.open(path).mode == "1"
    assert build_source(greys).label("a")[0].tolist() == [0, 1] * 3
    put_label(path, [0, 1, 0, 0, 0, 0])
    with pytest.raises(InputError, match=r"id 1 has the colour \(1, 1, 1\), which is not in data\.palette"):
        build_source(greys).label("a")


def test_a_palette_of_greys_is_a_grey_image(tmp_path: Path) -> None:
    folder_tree(tmp_path)
    put_palette_label(tmp_path / "labels/train/a.png", [0, 1, 2, 0, 0, 0], [[k, k, k] for k in range(256)])
    source = build_source(folder_config(tmp_path, palette=RED_GREEN_BLUE))
    assert source.label("a")[0].tolist() == [0, 1, 2, 0, 0, 0]


def test_a_mask_of_colours_must_be_opaque(tmp_path: Path) -> None:
    folder_tree(tmp_path)
    mask = np.full((*SIZE, 4), (255, 0, 0, 255), dtype=np.uint8)
    source = build_source(folder_config(tmp_path, palette=RED_GREEN_BLUE))
    Image.fromarray(mask).save(tmp_path / "labels/train/a.png")
    assert (source.label("a") == 0).all()
    mask[0, 0, 3] = 254
    Image.fromarray(mask).save(tmp_path / "labels/train/a.png")
    with pytest.raises(InputError, match=r"a\.png: an RGB mask with transparent pixels"):
        source.label("a")


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_an_image_in_two_subsets_by_a_link_is_refused(tmp_path: Path, link: Callable[..., None]) -> None:
    folder_tree(tmp_path)
    (tmp_path / "images/val/c.jpg").unlink()
    link(tmp_path / "images/train/a.jpg", tmp_path / "images/val/c.jpg")
    with pytest.raises(InputError, match=r"val\.txt:1: .*c\.jpg is by a link the same file as .*a\.jpg"):
        build_source(folder_config(tmp_path))


def test_two_links_to_one_folder_are_both_searched(tmp_path: Path) -> None:
    folder_tree(tmp_path)
    (tmp_path / "images/again").symlink_to(tmp_path / "images/train", target_is_directory=True)
    source = build_source(folder_config(tmp_path, ("train/a", "again/b", "val/c")))
    assert source.image("again/b").shape == (*SIZE, 3)
    assert build_source(folder_config(tmp_path)).image("b").shape == (*SIZE, 3)
    with pytest.raises(InputError, match="by a link the same file"):
        build_source(folder_config(tmp_path, ("train/a", "again/a", "c")))


def test_an_id_out_of_range_names_file_id_and_classes(tmp_path: Path) -> None:
    folder_tree(tmp_path)
    put_label(tmp_path / "labels/train/a.png", [0, 1, 3, 0, 0, 0])
    with pytest.raises(InputError, match=r"a\.png: label id 3, but there are 3 classes"):
        build_source(folder_config(tmp_path)).label("a")


def test_an_rgb_mask_needs_a_palette(tmp_path: Path) -> None:
    folder_tree(tmp_path)
    colours = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]]
    mask = np.array([[colours[k] for k in (2, 1, 0, 3, 0, 0)]] * SIZE[0], dtype=np.uint8)
    Image.fromarray(mask).save(tmp_path / "labels/train/a.png")
    with pytest.raises(InputError, match=r"a\.png: an RGB mask.*data\.palette"):
        build_source(folder_config(tmp_path)).label("a")
    with pytest.raises(InputError, match=r"a\.png: colour \(0, 0, 0\) is not in data\.palette"):
        build_source(folder_config(tmp_path, palette=colours[:3])).label("a")
    source = build_source(folder_config(tmp_path, palette=colours))
    assert source.label("a")[0].tolist() == [2, 1, 0, 255, 0, 0]
    assert source.palette.tolist() == colours[:3]


def test_a_size_mismatch_names_both_files_and_sizes(tmp_path: Path) -> None:
    folder_tree(tmp_path)
    put_label(tmp_path / "labels/train/a.png", 1, size=(4, 5))
    with pytest.raises(InputError, match=r"a\.jpg is 6 x 4 pixels, its label .*a\.png is 5 x 4"):
        build_source(folder_config(tmp_path)).label("a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": "pictures"}, r"pictures: no such folder \(data\.images\)"),
        ({"labels": "masks"}, r"masks: no such folder \(data\.labels\)"),
        ({"images": "{name}.jpg"}, r"labeled\.txt:1: no image for a: .*a\.jpg does not exist"),
        ({"palette": [[0, 0, 0]]}, r"data\.palette: 1 colours for 3 classes"),
        (
            {"palette": [[0, 0, 0], [1, 1, 1], [0, 0, 0]]},
            r"data\.palette: colour \(0, 0, 0\) stands for both",
        ),
        ({"classes": ["x", "x"]}, r"data\.classes: class 'x' is duplicated"),
        ({"classes": Path("none.txt")}, r"none\.txt: no such file of class names"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder_tree(tmp_path)
    with pytest.raises(InputError, match=message):
        build_source(folder_config(tmp_path, **change))


def test_class_names_come_from_a_file_too(tmp_path: Path) -> None:
    folder_tree(tmp_path)
    (tmp_path / "classes.txt").write_bytes("\ufeffsky\r\nroad\r\n\r\ntree".encode())
    assert build_source(folder_config(tmp_path, classes=tmp_path / "classes.txt")).classes == (
        "sky",
        "road",
        "tree",
    )


def test_truncated_and_foreign_files_are_input_errors(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("a.jpg", "a.png", "a.webp", "a.bmp", "a.tif"):
        path = tmp_path / name
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(InputError, match=rf"{name}: ") as error:
            read_image(path)
        assert "\n" not in str(error.value)
    (tmp_path / "b.jpg").write_text("no image at all")
    with pytest.raises(InputError, match=r"b\.jpg: not a readable"):
        read_image(tmp_path / "b.jpg")
    (tmp_path / "c.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"c\.png: "):
        read_mask(tmp_path / "c.png")
    with pytest.raises(InputError, match=r"none\.jpg: no such file"):
        read_image(tmp_path / "none.jpg")


def test_sixteen_bits_are_refused_as_image_and_read_as_ids_if_they_fit(tmp_path: Path) -> None:
    Image.fromarray(np.full(SIZE, 200, np.uint16)).save(tmp_path / "grey.png")
    with pytest.raises(InputError, match=r"grey\.png: 8 bits a channel are expected"):
        read_image(tmp_path / "grey.png")
    assert (read_mask(tmp_path / "grey.png") == 200).all()
    Image.fromarray(np.full(SIZE, 256, np.uint16)).save(tmp_path / "grey.png")
    with pytest.raises(InputError, match=r"grey\.png: label id 256"):
        read_mask(tmp_path / "grey.png")
    (tmp_path / "rgb.png").write_bytes(png(2, 1, 16, 2, bytes(12)))
    with pytest.raises(InputError, match=r"rgb\.png: 8 bits a channel are expected.*RGB;16B"):
        read_image(tmp_path / "rgb.png")


@pytest.mark.parametrize(("bits", "row"), [(1, b"\x40"), (2, b"\x1b"), (4, b"\x01\x23")])
def test_ids_of_few_bits_are_the_numbers_in_the_file(tmp_path: Path, bits: int, row: bytes) -> None:
    (tmp_path / "a.png").write_bytes(png(4, 1, bits, 0, row))
    expected = [0, 1, 0, 0] if bits == 1 else [0, 1, 2, 3]
    assert read_mask(tmp_path / "a.png")[0].tolist() == expected


def test_palette_and_grey_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    for mode in ("L", "P", "RGBA", "1", "LA"):
        Image.new(mode, (3, 2)).save(tmp_path / "a.png")
        assert read_image(tmp_path / "a.png").shape == (2, 3, 3)


def test_an_index_png_keeps_ids_and_colours(tmp_path: Path) -> None:
    label = np.array([[0, 1, 2], [255, 2, 0]], dtype=np.uint8)
    palette = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=np.uint8)
    save_index_png(tmp_path / "deep/a.png", label, palette)
    np.testing.assert_array_equal(read_mask(tmp_path / "deep/a.png"), label)
    shown = np.array(Image.open(tmp_path / "deep/a.png").convert("RGB"))
    np.testing.assert_array_equal(shown[0], palette)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.png"]


def png(width: int, height: int, bits: int, colour_type: int, row: bytes) -> bytes:
    """A PNG of equal rows, in bit depths that Pillow does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
