"""Split files: all public forms, and the lines that must be refused."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from prcl_fast.data.sources.splits import check_disjoint, make_split, read_split
from prcl_fast.data.tools.split_tools import choose_labeled, convert_lines, write_lines
from prcl_fast.errors import InputError


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


FORMS = {
    "U2PL VOC": ("2011_000068\n2008_004588\n", ["2011_000068", "2008_004588"], "VOC ids"),
    "U2PL Cityscapes": (
        "leftImg8bit/train/hamburg/hamburg_000000_080169_leftImg8bit.png\n"
        "leftImg8bit/train/ulm/ulm_000061_000019_leftImg8bit.png\n",
        ["hamburg_000000_080169", "ulm_000061_000019"],
        "U2PL (Cityscapes paths)",
    ),
    "PRCL Cityscapes": (
        "aachen_000013_000019_leftImg8bit\n",
        ["aachen_000013_000019"],
        "PRCL (Cityscapes stems)",
    ),
    "UniMatch VOC": (
        "JPEGImages/2007_000032.jpg SegmentationClass/2007_000032.png\n",
        ["2007_000032"],
        "UniMatch (VOC path pairs)",
    ),
    "UniMatch Cityscapes": (
        "leftImg8bit/train/jena/jena_000078_000019_leftImg8bit.png "
        "gtFine/train/jena/jena_000078_000019_gtFine_labelTrainIds.png\n",
        ["jena_000078_000019"],
        "UniMatch (Cityscapes path pairs)",
    ),
    "CPS Cityscapes": (
        "/images/train/jena_000078_000019.png\t/segmentation/train/jena_000078_000019_gtFine.png\n",
        ["jena_000078_000019"],
        "CPS (Cityscapes paths with a tab)",
    ),
    "own ids": (
        "0001TP_006690\ntrain/0001TP_006720\nimg.001\n",
        ["0001TP_006690", "train/0001TP_006720", "img.001"],
        "ids",
    ),
    "own paths": ("./train/a b.JPG\ntrain/c.png\n", ["train/a b", "train/c"], "image paths"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_public_form_gives_the_ids_and_its_family(tmp_path: Path, form: str) -> None:
    text, names, family = FORMS[form]
    split = read_split(write(tmp_path / "labeled.txt", text)).split
    assert list(split.names) == names
    assert split.family == family


@pytest.mark.parametrize("form", FORMS)
def test_line_ends_blank_lines_and_a_byte_order_mark_change_nothing(tmp_path: Path, form: str) -> None:
    text, names, _ = FORMS[form]
    lines = text.splitlines()
    for variant in (
        "\r\n".join(lines) + "\r\n",
        "\n".join(lines),
        "\n\n" + "\n \t\n".join(lines) + "\n\n",
        "\ufeff" + "\r\n".join(lines),
    ):
        split = read_split(write(tmp_path / "labeled.txt", variant)).split
        assert list(split.names) == names


def test_the_fingerprint_is_that_of_the_ids_in_order() -> None:
    split = make_split(["b", "a"])
    assert split.fingerprint == hashlib.sha256(b"b\na").hexdigest()[:12]
    assert split.fingerprint != make_split(["a", "b"]).fingerprint


@pytest.mark.parametrize(
    "line",
    [
        "../secret",
        "a/../../secret",
        "..\\secret",
        "/etc/passwd",
        "C:/images/a",
        "JPEGImages/../../a.jpg SegmentationClass/a.png",
        "JPEGImages/a.jpg ../a.png",
        "/images/../../a.png\t/segmentation/a.png",
        "/images/a.png\t/../a.png",
        "//etc/a.png\t/segmentation/a.png",
        "a\0b",
        "a//b",
    ],
)
def test_a_line_that_leaves_the_data_set_is_refused_with_file_and_line(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "labeled.txt", f"\n{line}\n")
    with pytest.raises(InputError, match=r"labeled\.txt:2: ") as error:
        read_split(path)
    assert "\n" not in str(error.value)
    assert "\0" not in str(error.value)


def test_an_absolute_id_is_told_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'/etc/passwd' leaves the data set; .* relative to its root"):
        read_split(write(tmp_path / "labeled.txt", "/etc/passwd\n"))


def test_a_leading_slash_is_the_root_in_lines_of_two_paths(tmp_path: Path) -> None:
    file = read_split(write(tmp_path / "a.txt", "/images/x/1.png\t/labels/x/1.png\n"))
    assert (file.entries[0].image, file.entries[0].label) == ("images/x/1.png", "labels/x/1.png")
    assert file.names == ("images/x/1",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"labeled\.txt: the split file is empty"),
        (b" \r\n\n", r"labeled\.txt: the split file is empty"),
        (b"a\n\nb\na\n", r"labeled\.txt:4: a is duplicated; first in line 1"),
        (b"2007_000032\nJPEGImages/2007_000039.jpg S/2007_000039.png\n", r"labeled\.txt:2: written as"),
        (b"a.png\tb.png\tc.png\n", r"labeled\.txt:1: 3 columns"),
        (b"\xff\xfe2\x000\x00", r"labeled\.txt: .*not UTF-8 text"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_split(write(tmp_path / "labeled.txt", content))


def test_missing_files_and_folders_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.txt: no such split file"):
        read_split(tmp_path / "none.txt")
    with pytest.raises(InputError, match="cannot be read as a split file"):
        read_split(tmp_path)


def test_overlap_names_both_files_the_first_id_and_the_count(tmp_path: Path) -> None:
    labeled = read_split(write(tmp_path / "labeled.txt", "2007_000032\n2007_000039\n2007_000063\n"))
    pairs = "".join(
        f"JPEGImages/{n}.jpg SegmentationClass/{n}.png\n" for n in ("x", "2007_000063", "2007_000039")
    )
    unlabeled = read_split(write(tmp_path / "unlabeled.txt", pairs))
    with pytest.raises(
        InputError, match=r"unlabeled\.txt and .*/labeled\.txt have 2 .* the first is 2007_000063"
    ):
        check_disjoint([labeled, unlabeled])


def test_converting_between_all_families_keeps_the_ids(tmp_path: Path) -> None:
    ids = {"voc": "2007_000032\n2011_000068\n", "cityscapes": "jena_000078_000019\nfrankfurt_000001_062250\n"}
    for dataset, text in ids.items():
        file = read_split(write(tmp_path / "a.txt", text))
        for family in ("u2pl", "prcl", "unimatch", "cps"):
            lines = convert_lines(file, family, dataset)
            back = read_split(write(tmp_path / "b.txt", "\n".join(lines)))
            assert back.names == file.names, (dataset, family)
    lines = convert_lines(file, "u2pl", "cityscapes")
    assert lines[1] == "leftImg8bit/val/frankfurt/frankfurt_000001_062250_leftImg8bit.png"


def test_converting_refuses_an_id_of_another_data_set(tmp_path: Path) -> None:
    file = read_split(write(tmp_path / "a.txt", "2007_000032\n"))
    with pytest.raises(InputError, match=r"a\.txt:1: 2007_000032 is no id of cityscapes"):
        convert_lines(file, "u2pl", "cityscapes")


def test_a_draw_depends_on_the_seed_alone_and_grows_by_inclusion() -> None:
    names = [f"{i:04d}" for i in range(200)]
    small, large = choose_labeled(names, 20, 0), choose_labeled(names, 60, 0)
    assert len(small) == 20
    assert small < large
    assert choose_labeled(names[::-1], 20, 0) == small
    assert choose_labeled(names, 20, 1) != small


def test_a_covering_draw_holds_every_class() -> None:
    names = [f"{i:04d}" for i in range(300)]
    presence = {name: np.array([True, i % 3 == 0, i == 123, i in (7, 8)]) for i, name in enumerate(names)}
    classes = ("a", "b", "rare", "scarce")
    for seed in range(5):
        chosen = choose_labeled(names, 6, seed, presence=presence, classes=classes)
        assert len(chosen) == 6
        assert np.any([presence[name] for name in chosen], axis=0).all()
    with pytest.raises(InputError, match="1 labeled images do not hold every class"):
        choose_labeled(names, 1, 0, presence=presence, classes=classes)
    nowhere = {name: np.append(found, False) for name, found in presence.items()}
    with pytest.raises(InputError, match="class unicorn is in none of the 300 images"):
        choose_labeled(names, 6, 0, presence=nowhere, classes=(*classes, "unicorn"))


@pytest.mark.parametrize("count", [0, 3, 4])
def test_a_draw_leaves_something_on_both_sides(count: int) -> None:
    with pytest.raises(InputError, match="1 to 2 are possible"):
        choose_labeled(["a", "b", "c"], count, 0)


def test_an_existing_split_file_is_never_overwritten(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.txt", ["x"])
    with pytest.raises(InputError, match=r"a\.txt: exists already"):
        write_lines(tmp_path / "a.txt", ["y"])
    assert (tmp_path / "a.txt").read_bytes() == b"x\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.fixture
def public() -> Path:
    folder = os.environ.get("PRCL_SPLITS")
    if not folder:
        pytest.skip("PRCL_SPLITS does not name a folder with the public split files")
    return Path(folder)


def test_the_public_files_are_recognised(public: Path) -> None:
    expected = {
        "u2pl/pascal/662/labeled.txt": (662, "VOC ids, 662 labeled of U2PL = PRCL"),
        "prcl/VOC_split/662/3407/labeled_filename.txt": (662, "VOC ids, 662 labeled of U2PL = PRCL"),
        "cps/pascal_voc/train_aug_labeled_1-16.txt": (662, "VOC ids, 662 labeled of CPS = UniMatch"),
        "cps/pascal_voc/pseudoseg_unlabeled_1-16.txt": (1373, "VOC ids, 1/16 unlabeled of PseudoSeg (CPS)"),
        "unimatch/pascal/val.txt": (1449, "UniMatch (VOC path pairs), val"),
        "unimatch/cityscapes/1_16/labeled.txt": (
            186,
            "UniMatch (Cityscapes path pairs), 186 labeled of CPS = UniMatch",
        ),
        "u2pl/cityscapes/186/labeled.txt": (186, "U2PL (Cityscapes paths), 186 labeled of U2PL"),
        "cps/city/val.txt": (500, "CPS (Cityscapes paths with a tab), val"),
        "prcl/CityScapes_split/150/3407/valid_filename.txt": (
            1525,
            "PRCL (Cityscapes stems), test (its labels are not public)",
        ),
    }
    for name, (count, family) in expected.items():
        split = read_split(public / name).split
        assert (len(split.names), split.family) == (count, family), name


def test_converted_public_files_equal_those_of_the_other_family(public: Path) -> None:
    u2pl = read_split(public / "u2pl/pascal/662/labeled.txt")
    unimatch = (public / "unimatch/pascal/u2pl_1_16/labeled.txt").read_text()
    assert convert_lines(u2pl, "unimatch", "voc") == unimatch.splitlines()
    city = read_split(public / "unimatch/cityscapes/1_16/labeled.txt")
    cps = (public / "cps/city/train_aug_labeled_1-16.txt").read_text()
    assert convert_lines(city, "cps", "cityscapes") == cps.splitlines()


def test_public_labeled_and_unlabeled_lists_are_disjoint(public: Path) -> None:
    for labeled in sorted(public.glob("**/labeled*.txt")):
        unlabeled = labeled.with_name(labeled.name.replace("labeled", "unlabeled", 1))
        check_disjoint([read_split(labeled), read_split(unlabeled)])
