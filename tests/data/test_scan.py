"""The scan of labels: every kind of wrong label is found, good ones are counted and cached."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prcl_fast.config import DataConfig
from prcl_fast.data.source import Source
from prcl_fast.data.sources import build_source
from prcl_fast.data.tools import scan_cache
from prcl_fast.data.tools.scan import scan_labels
from prcl_fast.errors import InputError

NAMES = {"labeled": ("l0", "l1"), "unlabeled": ("u0",), "val": ("v0", "v1")}


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Three classes, images of 6 x 8; label k has class k % 3, except for its unlabeled first row."""
    for subset, names in NAMES.items():
        (tmp_path / f"{subset}.txt").write_text("\n".join(names))
        for k, name in enumerate(names):
            save_image(tmp_path / "images" / f"{name}.jpg")
            if subset != "unlabeled":
                save_label(tmp_path / "labels" / f"{name}.png", k % 3)
    splits = {subset: tmp_path / f"{subset}.txt" for subset in NAMES}
    return DataConfig(kind="folder", root=tmp_path, classes=["a", "b", "c"], **splits)


def save_image(path: Path, size: tuple[int, int] = (8, 6)) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, (10, 20, 30)).save(path)


def save_label(path: Path, value: int) -> None:
    path.parent.mkdir(exist_ok=True)
    label = np.full((6, 8), value, dtype=np.uint8)
    label[0] = 255
    Image.fromarray(label).save(path)


class Counting:
    """Counts the labels that are read."""

    def __init__(self) -> None:
        self.read = 0

    def __call__(self, done: int, total: int) -> None:
        self.read += 1


def scan_and_count(source: Source, cache: Path) -> int:
    counting = Counting()
    scan_labels(source, cache=cache, progress=counting)
    return counting.read


@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_are_counted_per_image_and_class(data: DataConfig, workers: int) -> None:
    scan = scan_labels(build_source(data), workers=workers)
    assert scan.pixels["labeled"].tolist() == [[40, 0, 0, 8], [0, 40, 0, 8]]
    assert scan.pixels["val"].dtype == np.int64
    assert set(scan.pixels) == {"labeled", "val"}


def test_an_id_out_of_range_names_file_id_and_number_of_classes(data: DataConfig) -> None:
    save_label(data.root / "labels/l1.png", 7)
    with pytest.raises(InputError, match=r"l1\.png: label id 7, but there are 3 classes"):
        scan_labels(build_source(data)).check()


def test_a_size_that_differs_names_both_files_and_sizes(data: DataConfig) -> None:
    save_image(data.root / "images/v0.jpg", (9, 6))
    with pytest.raises(InputError, match=r"v0\.jpg is 9 x 6 pixels, its label .*v0\.png is 8 x 6"):
        scan_labels(build_source(data)).check()


def test_all_problems_are_gathered_in_order_and_the_first_is_raised(data: DataConfig) -> None:
    save_label(data.root / "labels/l1.png", 7)
    (data.root / "labels/v1.png").write_bytes(b"no image")
    scan = scan_labels(build_source(data))
    assert [problem.split(":")[0].rpartition("/")[2] for problem in scan.problems] == ["l1.png", "v1.png"]
    assert scan.pixels["labeled"].tolist() == [[40, 0, 0, 8], [0, 0, 0, 0]]
    with pytest.raises(InputError, match=r"l1\.png.*and 1 more"):
        scan_labels(build_source(data)).check()


def test_the_second_scan_reads_nothing_and_gives_the_same(data: DataConfig, tmp_path: Path) -> None:
    source, cache = build_source(data), tmp_path / "cache" / "scan.json"
    first = scan_labels(source, cache=cache)
    counting = Counting()
    second = scan_labels(source, cache=cache, progress=counting)
    assert counting.read == 0
    for subset, pixels in first.pixels.items():
        np.testing.assert_array_equal(pixels, second.pixels[subset])


def test_only_what_changed_is_read_again(data: DataConfig, tmp_path: Path) -> None:
    source, cache = build_source(data), tmp_path / "cache" / "scan.json"
    assert scan_and_count(source, cache) == 4
    os.utime(data.root / "labels/l0.png", ns=(1, 1))
    assert scan_and_count(source, cache) == 1
    os.utime(data.root / "images/v0.jpg", ns=(1, 1))
    assert scan_and_count(source, cache) == 1
    assert scan_and_count(source, cache) == 0
    assert len(json.loads(cache.read_text())["labels"]) == 4  # what is outdated is not kept


def test_other_classes_or_another_label_map_are_another_reading(data: DataConfig, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "scan.json"
    scan_labels(build_source(data), cache=cache)
    assert scan_and_count(build_source(data.model_copy(update={"classes": ["a", "b"]})), cache) == 4
    mapped = build_source(data.model_copy(update={"label_map": {0: 1}}))
    assert scan_labels(mapped, cache=cache).pixels["labeled"].tolist()[0] == [0, 40, 0, 8]
    assert scan_and_count(build_source(data), cache) == 0  # the first reading is still known


def test_labels_are_read_again_when_files_are_read_in_another_way(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = build_source(data), tmp_path / "cache" / "scan.json"
    with monkeypatch.context() as former:
        former.setattr("prcl_fast.data.tools.scan_cache.READING", 1)  # the orientation was not applied
        assert scan_and_count(source, cache) == 4
    assert scan_and_count(source, cache) == 4
    assert scan_and_count(source, cache) == 0


def test_a_bad_label_is_never_remembered_as_good(data: DataConfig, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "scan.json"
    save_label(data.root / "labels/l1.png", 7)
    for _ in range(2):
        with pytest.raises(InputError, match="label id 7"):
            scan_labels(build_source(data), cache=cache).check()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 0, "labels": {}}', '{"version": 1}'])
def test_a_damaged_cache_is_made_again(data: DataConfig, tmp_path: Path, text: str) -> None:
    cache = tmp_path / "cache" / "scan.json"
    cache.parent.mkdir()
    cache.write_text(text)
    assert scan_and_count(build_source(data), cache) == 4
    assert len(json.loads(cache.read_text())["labels"]) == 4
    assert list(cache.parent.iterdir()) == [cache]


WRONG_ENTRIES = [
    *(None, 7, [], [1, 2], ["stamp"], ["stamp", 5], ["stamp", [40, 0, 0, 8]], {"stamp": "text"}),
    *(
        ["stamp", text]
        for text in ("", "grey", "grey 0:0", "grey 300:1", "grey 7:48", "grey 0:" + "9" * 5000)
    ),
    *(["stamp", text] for text in ("colours 3:1", "other 0:48", "grey 0:48:zzzzzz", "grey 0:48" * 9999)),
]


@pytest.mark.parametrize("wrong", WRONG_ENTRIES)
def test_an_entry_that_is_not_right_is_read_again(data: DataConfig, tmp_path: Path, wrong: object) -> None:
    cache = tmp_path / "cache" / "scan.json"
    expected = scan_labels(build_source(data), cache=cache).pixels["labeled"].tolist()
    tree = json.loads(cache.read_text())
    key = next(key for key in tree["labels"] if key.endswith("l0.png"))
    stamp = tree["labels"][key][0]
    if isinstance(wrong, list) and wrong and wrong[0] == "stamp":
        wrong = [stamp, *wrong[1:]]
    tree["labels"][key] = wrong
    cache.write_text(json.dumps(tree))
    assert scan_and_count(build_source(data), cache) == 1
    assert scan_labels(build_source(data), cache=cache).pixels["labeled"].tolist() == expected


@pytest.mark.parametrize("kind", ["pipe", "endless", "deep", "long"])
def test_a_cache_that_is_no_text_of_ours_is_made_again(
    data: DataConfig, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache" / "scan.json"
    cache.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(cache)
    elif kind == "endless":
        cache.symlink_to("/dev/zero")
    else:
        cache.write_text("[" * 100_000)
        if kind == "long":
            monkeypatch.setattr(scan_cache, "_MAX_BYTES", 1000)
    assert scan_and_count(build_source(data), cache) == 4


def test_a_cache_that_others_may_write_or_own_is_not_trusted(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache" / "scan.json"
    assert scan_and_count(build_source(data), cache) == 4
    cache.chmod(0o666)
    assert scan_and_count(build_source(data), cache) == 4
    assert scan_and_count(build_source(data), cache) == 0
    state = cache.stat()
    owned = os.stat_result((*state[:4], 12345, *state[5:]))
    monkeypatch.setattr(scan_cache.os, "geteuid", lambda: 54321)
    monkeypatch.setattr(scan_cache.os, "stat", lambda path, **_: owned)
    assert scan_cache.read_entries(cache) == {}


def test_a_cache_that_cannot_be_written_costs_only_time(
    data: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where a folder is needed")
    assert scan_and_count(build_source(data), tmp_path / "cache" / "scan.json") == 4
    assert "cannot be kept" in caplog.text


def test_an_unlabeled_image_without_a_label_is_a_problem_only_where_it_is_asked_for(data: DataConfig) -> None:
    source = build_source(data)
    scan_labels(source).check()
    with pytest.raises(InputError, match=r"u0\.jpg: this unlabeled image has no label file"):
        scan_labels(source, ("unlabeled",)).check()


def test_a_generated_data_set_is_counted_too() -> None:
    synthetic = {"size": [64, 64], "labeled": 3, "unlabeled": 1, "val": 2}
    source = build_source(DataConfig(kind="synthetic", synthetic=synthetic))
    scan = scan_labels(source)
    assert scan.pixels["labeled"].sum() == 3 * 64 * 64
    assert scan.pixels["val"].shape == (2, len(source.classes) + 1)
