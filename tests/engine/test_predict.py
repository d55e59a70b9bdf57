"""Prediction on files: written files, their sizes, refused inputs."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from prcl_fast.cli.predict import predict_command
from prcl_fast.config import parse_config
from prcl_fast.engine.predict import (
    Unreadable,
    check_all_predicted,
    colour_variance,
    predict_files,
    predict_image,
)
from prcl_fast.engine.predict_inputs import InputImage, find_images
from prcl_fast.errors import InputError, RunError
from prcl_fast.runs.checkpoint import LoadedRun
from support.run_folders import write_run
from support.tiny import tiny_tree

CPU = torch.device("cpu")
PALETTE = np.array([[10, 20, 30], [200, 0, 1], [0, 255, 100], [7, 7, 7]], np.uint8)


class RedIsTheClass(nn.Module):
    """Class = red / 60, rounded; sigma^2 = green in its first dimension, 0 in its second."""

    def __init__(self, data, probability=True):
        super().__init__()
        self.register_buffer("mean", torch.tensor(data.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(data.std).view(1, 3, 1, 1))
        if probability:
            self.probability = nn.Identity()

    def forward(self, x, representations=True):
        image = x * self.std + self.mean
        red, green = image[:, :1] * 255, image[:, 1:2]
        logits = -(((red / 60) - torch.arange(4.0).view(1, 4, 1, 1)) ** 2)
        features = torch.cat([green, torch.zeros_like(green)], dim=1)
        return types.SimpleNamespace(logits=logits, features=features)


@pytest.fixture
def loaded(tmp_path):
    config = parse_config(tiny_tree(tmp_path / "run"), "test")
    networks = {
        "teacher": RedIsTheClass(config.data),
        "student": RedIsTheClass(config.data, probability=False),
    }
    return LoadedRun(Path("run/best.pt"), config, tuple("abcd"), PALETTE, 7, networks)


def save_image(path, height, width, seed=0):
    """A lossless image whose classes are known."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 4, (height, width), dtype=np.uint8)
    image = np.stack(
        [classes * 60, rng.integers(0, 256, (height, width), dtype=np.uint8), classes * 0], axis=2
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return image, classes


def test_files_have_the_image_size_ids_palette_blend_and_variance(loaded, tmp_path):
    sizes = {"a": (31, 50), "b": (5, 3)}
    truth = {name: save_image(tmp_path / f"in/{name}.png", *size) for name, size in sizes.items()}
    out = tmp_path / "out"
    written = list(predict_files(loaded, None, find_images([tmp_path / "in"]), out, CPU, raw=True))
    assert [item.image.stem for item in written] == ["a", "b"]
    for item in written:
        image, classes = truth[item.image.stem]
        index, overlay, variance, numbers = item.files
        with Image.open(index) as png:
            assert (png.mode, png.size) == ("P", classes.shape[::-1])
            np.testing.assert_array_equal(np.array(png), classes)
            assert png.getpalette()[:12] == PALETTE.ravel().tolist()
        mean = (image.astype(float) + PALETTE[classes]) / 2
        assert np.abs(np.array(Image.open(overlay)) - mean).max() <= 0.5
        values = np.load(numbers)
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, image[..., 1] / 255 / 2, atol=1e-6)
        with Image.open(variance) as png:
            low, high = float(png.text["variance_min"]), float(png.text["variance_max"])
            assert (low, high) == pytest.approx((values.min(), values.max()))
            np.testing.assert_array_equal(np.array(png), colour_variance(values, low, high))
        assert item.variance_range == pytest.approx((low, high))
    assert len(list(out.iterdir())) == 8  # no temporary file stays


def test_without_probability_head_there_is_no_variance_map(loaded, tmp_path):
    save_image(tmp_path / "a.png", 8, 8)
    out = tmp_path / "out"
    (written,) = predict_files(loaded, "student", find_images([tmp_path / "a.png"]), out, CPU, raw=True)
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "a_overlay.png"]
    assert written.variance_range is None


@pytest.mark.parametrize("wrong", ["logits", "features"])
def test_an_output_that_is_not_finite_is_refused_and_not_written(loaded, tmp_path, wrong):
    class Diverged(RedIsTheClass):
        def forward(self, x, representations=True):
            output = super().forward(x, representations)
            getattr(output, wrong).mul_(float("nan"))
            return output

    save_image(tmp_path / "a.png", 8, 8)
    run = dataclasses.replace(loaded, networks={"teacher": Diverged(loaded.config.data)})
    out = tmp_path / "out"
    with pytest.raises(
        RunError, match=r"run/best\.pt: the output of this network for .*a\.png is not finite"
    ):
        list(predict_files(run, None, find_images([tmp_path / "a.png"]), out, CPU))
    assert not out.exists()


def test_variance_colours_run_from_dark_blue_to_yellow_and_a_flat_map_is_dark():
    colours = colour_variance(np.array([[0.2, 0.4]]), 0.2, 0.4)
    assert colours.tolist() == [[[68, 1, 84], [253, 231, 36]]]
    assert colour_variance(np.full((1, 1), 0.3), 0.3, 0.3).tolist() == [[[68, 1, 84]]]


@pytest.mark.parametrize("mode", ["whole", "center", "sliding"])
@pytest.mark.parametrize("average", ["logits", "softmax"])
def test_prediction_covers_the_whole_image_in_every_mode(loaded, tmp_path, mode, average):
    image, classes = save_image(tmp_path / "a.png", 40, 70)
    changed = {"mode": mode, "average": average, "window": [32, 32], "crop": [32, 32]}
    config = loaded.config.model_copy(update={"eval": loaded.config.eval.model_copy(update=changed)})
    prediction = predict_image(loaded.networks["teacher"], image, config, CPU)
    np.testing.assert_array_equal(prediction.label, classes)
    logits = -((classes[..., None] - np.arange(4.0)) ** 2)
    expected = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).max(-1)
    np.testing.assert_allclose(prediction.confidence, expected, rtol=1e-4)


def empty_file(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def test_folders_are_searched_with_their_subfolders_in_order(tmp_path):
    for name in ("in/b.PNG", "in/a.jpg", "in/sub/deep/c.png", "in/notes.txt", "in/d.jpe", "in/e.JFIF"):
        empty_file(tmp_path / name)
    other = empty_file(tmp_path / "other.tif")
    found = find_images([other, tmp_path / "in"])
    names = ("a.jpg", "b.PNG", "d.jpe", "e.JFIF", "sub/deep/c.png")
    folder = [InputImage(tmp_path / "in" / name, Path(name).with_suffix("")) for name in names]
    assert found.images == (InputImage(other, Path("other")), *folder)
    assert found.passed_over_line() is None


def test_hidden_files_are_passed_over_and_other_images_are_counted(tmp_path):
    for name in (
        "._a.jpg",
        ".DS_Store",
        ".thumbnails/a.jpg",
        "a.jpg",
        "b.heic",
        "s/c.HEIC",
        "d.gif",
        "e.txt",
    ):
        empty_file(tmp_path / "in" / name)
    found = find_images([tmp_path / "in"])
    assert [image.path.name for image in found.images] == ["a.jpg"]
    assert found.passed_over_line().startswith("passed over: 2 .heic, 1 .gif; images are .jpg, ")
    (tmp_path / "in/a.jpg").unlink()
    with pytest.raises(InputError, match=r"in: no image in this folder and below; passed over: 2 \.heic"):
        find_images([tmp_path / "in"])


def test_links_in_a_circle_end(tmp_path):
    save_image(tmp_path / "in/sub/a.png", 8, 8)
    (tmp_path / "in/sub/loop").symlink_to(tmp_path / "in", target_is_directory=True)
    assert [image.place for image in find_images([tmp_path / "in"]).images] == [Path("sub/a")]


def test_outputs_keep_the_subfolders(loaded, tmp_path):
    for name in ("x/a.png", "y/a.png", "a.png"):
        save_image(tmp_path / "in" / name, 8, 8)
    out = tmp_path / "out"
    list(predict_files(loaded, "student", find_images([tmp_path / "in"]), out, CPU))
    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))
    assert found == [
        *("a.png", "a_overlay.png", "x/a.png", "x/a_overlay.png", "y/a.png", "y/a_overlay.png"),
    ]


def test_predictions_among_the_photos_are_not_predicted_by_the_next_call(loaded, tmp_path):
    save_image(tmp_path / "in/sub/a.png", 8, 8)
    photos = [tmp_path / "in", tmp_path / "in/sub/b.bmp"]
    save_image(photos[1], 8, 8)
    list(predict_files(loaded, None, find_images([tmp_path / "in"]), tmp_path / "in/out", CPU))
    list(predict_files(loaded, None, find_images([photos[1]]), tmp_path / "in/sub", CPU))
    found = find_images([tmp_path / "in"])
    assert [image.path.name for image in found.images] == ["a.png", "b.bmp"]
    assert found.passed_over_line().startswith("passed over: 9 written by prcl predict;")
    list(predict_files(loaded, None, found, tmp_path / "in/out", CPU))  # replaces the former outputs


def test_a_png_that_is_no_prediction_is_not_replaced(loaded, tmp_path):
    save_image(tmp_path / "a.bmp", 8, 8)
    save_image(tmp_path / "a.png", 8, 8)  # a mask drawn by hand, perhaps
    before = (tmp_path / "a.png").read_bytes()
    message = refused(loaded, [tmp_path / "a.bmp"], tmp_path)
    assert "a.png exists and was not written by prcl predict; choose another --out" in message
    assert (tmp_path / "a.png").read_bytes() == before
    assert not (tmp_path / "a_overlay.png").exists()


@pytest.mark.parametrize("by_name", [True, False])
def test_damaged_images_are_named_and_the_others_predicted(loaded, tmp_path, by_name):
    for name in "abcd":
        save_image(tmp_path / f"in/{name}.png", 64, 64)
    whole = (tmp_path / "in/b.png").read_bytes()
    (tmp_path / "in/b.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in/d.png").write_bytes(b"")
    inputs = find_images(sorted((tmp_path / "in").iterdir()) if by_name else [tmp_path / "in"])
    found = list(predict_files(loaded, "student", inputs, tmp_path / "out", CPU))
    assert [type(item) is Unreadable for item in found] == [False, True, False, True]
    assert "in/b.png: cannot be decoded" in found[1].reason
    assert "in/d.png: not a readable" in found[3].reason
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["a.png", "a_overlay.png", "c.png", "c_overlay.png"]
    check_all_predicted(0, inputs, CPU)
    with pytest.raises(RunError, match=r"2 of 4 images have no prediction"):
        check_all_predicted(2, inputs, CPU)


def test_a_name_too_long_for_the_outputs_is_named_and_nothing_of_it_written(loaded, tmp_path):
    for name in ("a" * 246, "b" * 241, "c"):
        save_image(tmp_path / f"in/{name}.png", 64, 64)
    found = list(predict_files(loaded, "student", find_images([tmp_path / "in"]), tmp_path / "out", CPU))
    assert [type(item) is Unreadable for item in found] == [True, False, False]
    assert found[0].reason.endswith("its outputs cannot be written: the name is too long")
    written = {path.name.strip(".") for path in (tmp_path / "out").iterdir()}
    assert written == {"b" * 241 + ".png", "b" * 241 + "_overlay.png", "c.png", "c_overlay.png"}


def test_an_image_beyond_the_bound_of_the_run_is_named_with_the_key(loaded, tmp_path):
    save_image(tmp_path / "a.png", 8, 8)
    data = loaded.config.data.model_copy(update={"max_pixels": 63})
    run = dataclasses.replace(loaded, config=loaded.config.model_copy(update={"data": data}))
    (found,) = predict_files(run, None, find_images([tmp_path / "a.png"]), tmp_path / "out", CPU)
    assert "data.max_pixels" in found.reason


def test_a_photo_is_predicted_as_it_is_shown(loaded, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg", exif=exif)
    (written,) = predict_files(loaded, None, find_images([tmp_path / "a.jpg"]), tmp_path / "out", CPU)
    assert {Image.open(file).size for file in written.files} == {(48, 64)}


def refused(loaded, inputs, out, network=None):
    with pytest.raises(InputError) as caught:
        list(predict_files(loaded, network, find_images(inputs), out, CPU))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_two_inputs_of_one_name_are_refused_before_anything_is_written(loaded, tmp_path):
    save_image(tmp_path / "x/a.png", 8, 8)
    save_image(tmp_path / "y/a.bmp", 8, 8)
    message = refused(loaded, [tmp_path / "x", tmp_path / "y"], tmp_path / "out")
    assert "y/a.bmp" in message
    assert "x/a.png" in message
    assert not (tmp_path / "out").exists()


def test_an_output_that_would_replace_another_output_or_an_input_is_refused(loaded, tmp_path):
    save_image(tmp_path / "a.png", 8, 8)
    before = (tmp_path / "a.png").read_bytes()
    assert "would replace an input" in refused(loaded, [tmp_path / "a.png"], tmp_path)
    assert (tmp_path / "a.png").read_bytes() == before
    save_image(tmp_path / "a_overlay.png", 8, 8)
    message = refused(loaded, [tmp_path / "a.png", tmp_path / "a_overlay.png"], tmp_path / "out")
    assert "a_overlay.png would be written for" in message


def test_missing_files_empty_folders_and_unknown_networks_are_refused(loaded, tmp_path):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    assert "none.png: no such file" in refused(loaded, [tmp_path / "none.png"], out)
    assert "empty: no image in this folder" in refused(loaded, [tmp_path / "empty"], out)
    save_image(tmp_path / "a.png", 8, 8)
    assert "has no ema, only teacher, student" in refused(loaded, [tmp_path / "a.png"], out, "ema")


def test_an_output_that_cannot_be_written_is_refused(loaded, tmp_path):
    save_image(tmp_path / "a.png", 8, 8)
    (tmp_path / "file").write_text("")
    assert "file" in refused(loaded, [tmp_path / "a.png"], tmp_path / "file")
    (tmp_path / "out/a.png").mkdir(parents=True)
    assert "cannot be written" in refused(loaded, [tmp_path / "a.png"], tmp_path / "out")


def test_the_command_predicts_with_a_checkpoint_and_says_the_range(tmp_path, capsys):
    write_run(tmp_path / "run", tiny_tree(tmp_path / "run"))
    save_image(tmp_path / "a.png", 40, 33)
    predict_command(tmp_path / "run", [tmp_path / "a.png"], out=tmp_path / "out", device="cpu", raw=True)
    assert "a_variance.npy; variance 0." in capsys.readouterr().err
    values = np.load(tmp_path / "out/a_variance.npy")
    assert values.shape == (40, 33)
    assert 0 < values.min() < values.max() < 1
