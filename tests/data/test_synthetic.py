"""The generated data set: reproducible, learnable by shape, and written in VOC's layout."""

from __future__ import annotations

import numpy as np
import pytest

from prcl_fast.config import DataConfig, SyntheticConfig, load_config
from prcl_fast.data.sources import build_source, synthetic
from prcl_fast.data.sources.synthetic import CLASSES, SyntheticSource, write_synthetic
from prcl_fast.errors import InputError, WriteError

SMALL = {"size": [64, 80], "labeled": 5, "unlabeled": 6, "val": 5}


def source(**changes) -> SyntheticSource:
    return SyntheticSource(DataConfig(kind="synthetic", synthetic=SyntheticConfig(**{**SMALL, **changes})))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_synthetic(folder, SyntheticConfig(**SMALL))
    return folder


def test_splits_have_the_configured_sizes_and_no_common_name():
    splits = source().splits
    assert {subset: len(split.names) for subset, split in splits.items()} == {
        "labeled": 5,
        "unlabeled": 6,
        "val": 5,
    }
    assert len({name for split in splits.values() for name in split.names}) == 16


def test_images_are_a_function_of_seed_subset_and_index():
    first = source()
    image = first.image("labeled_0000")
    synthetic._cached_scene.cache_clear()
    assert np.array_equal(source(labeled=3, val=9).image("labeled_0000"), image)
    others = [
        source(seed=1).image("labeled_0000"),
        first.image("labeled_0001"),
        first.image("val_0000"),
        first.image("unlabeled_0000"),
    ]
    assert not any(np.array_equal(other, image) for other in others)


def test_shapes_types_and_ids():
    made = source()
    for name in made.splits["val"].names:
        image, label = made.image(name), made.label(name)
        assert (image.shape, image.dtype) == ((64, 80, 3), np.uint8)
        assert (label.shape, label.dtype) == ((64, 80), np.uint8)
        assert label.max() < len(CLASSES)
    assert made.palette.shape == (len(made.classes), 3)


def test_a_caller_may_write_into_what_it_gets():
    made = source()
    made.image("val_0000")[:] = 0
    made.label("val_0000")[:] = 99
    assert made.image("val_0000").any()
    assert made.label("val_0000").max() < len(CLASSES)


def test_any_five_consecutive_images_show_every_class():
    made = source(labeled=12)
    present = [set(np.unique(made.label(name)).tolist()) for name in made.splits["labeled"].names]
    for first in range(8):
        assert set.union(*present[first : first + 5]) == set(range(len(CLASSES)))


def test_colour_tells_something_about_the_class_but_not_all():
    # The best guess from a pixel's quantised colour, fitted on one subset and evaluated on another.
    made = source(labeled=60, val=30)
    counts = {}
    for subset in ("labeled", "val"):
        names = made.splits[subset].names
        pixels = np.concatenate([made.image(name).reshape(-1, 3) for name in names]).astype(int)
        label = np.concatenate([made.label(name).ravel() for name in names])
        shape = label > 0
        counts[subset] = np.zeros((512, len(CLASSES)))
        np.add.at(counts[subset], ((pixels[shape] // 32) @ np.array([64, 8, 1]), label[shape]), 1)
    guess = counts["labeled"].argmax(axis=1)
    right = counts["val"][np.arange(512), guess].sum() / counts["val"].sum()
    most_common = counts["val"].sum(axis=0).max() / counts["val"].sum()
    assert most_common < right < 0.9


@pytest.mark.parametrize("size", [[63, 96], [96, 129]])
def test_a_size_out_of_range_is_an_input_error(size, tmp_path):
    with pytest.raises(InputError, match=r"data\.synthetic\.size"):
        source(size=size)
    with pytest.raises(InputError, match="size"):
        write_synthetic(tmp_path / "x", SyntheticConfig(size=size))


def test_the_written_configuration_is_valid_and_leads_to_the_data(written):
    config = load_config(written / "config.yaml")
    assert config.method.name == "prcl"
    assert config.data.crop == [64, 80]
    assert config.output.parts == ("runs", "shapes")
    on_disk, in_memory = build_source(config.data), source()
    assert on_disk.classes == in_memory.classes
    for subset in ("labeled", "unlabeled", "val"):
        assert on_disk.splits[subset].names == in_memory.splits[subset].names
        assert on_disk.splits[subset].fingerprint == in_memory.splits[subset].fingerprint


def test_what_is_written_is_what_is_generated(written):
    on_disk, in_memory = build_source(load_config(written / "config.yaml").data), source()
    for subset in ("labeled", "val"):
        for name in in_memory.splits[subset].names:
            assert np.array_equal(on_disk.label(name), in_memory.label(name))
    for name in in_memory.splits["unlabeled"].names:
        difference = on_disk.image(name).astype(int) - in_memory.image(name)
        assert np.abs(difference).mean() < 5  # JPEG of quality 95 on noisy images


def test_unlabeled_images_have_no_masks_on_disk(written):
    masks = {path.stem for path in (written / "SegmentationClass").iterdir()}
    assert masks == {f"{subset}_{index:04d}" for subset in ("labeled", "val") for index in range(5)}
    assert len(list((written / "JPEGImages").iterdir())) == 16


def test_nothing_temporary_is_left(written):
    assert [path.name for path in written.parent.iterdir()] == ["shapes"]


def test_a_folder_with_content_is_never_overwritten(written):
    (written / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="not an empty folder"):
        write_synthetic(written, SyntheticConfig(**SMALL))
    assert (written / "mine.txt").read_text() == "precious"
    (written / "mine.txt").unlink()


def test_a_failed_writing_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(synthetic, "save_index_png", full_disk)
    with pytest.raises(WriteError, match="no space"):
        write_synthetic(tmp_path / "shapes", SyntheticConfig(**SMALL))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [1, 2])
def test_the_configuration_is_valid_for_the_smallest_sets(count, tmp_path):
    write_synthetic(tmp_path / "s", SyntheticConfig(size=[64, 64], labeled=count, unlabeled=count, val=1))
    config = load_config(tmp_path / "s" / "config.yaml")
    assert config.train.batch_unlabeled == count
