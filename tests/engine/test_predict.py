"""Prediction on files: written files, their sizes, refused inputs."""

from __future__ import annotations

import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from prcl_fast.cli.predict import predict_command
from prcl_fast.config import parse_config
from prcl_fast.engine.predict import colour_variance, find_images, predict_files, predict_image
from prcl_fast.errors import InputError
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
    written = list(predict_files(loaded, None, [tmp_path / "in"], out, CPU, raw=True))
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
    (written,) = predict_files(loaded, "student", [tmp_path / "a.png"], out, CPU, raw=True)
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "a_overlay.png"]
    assert written.variance_range is None


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


def test_folders_are_searched_one_level_deep_in_order(tmp_path):
    for name in ("in/b.PNG", "in/a.jpg", "in/deeper/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "in/notes.txt").write_text("")
    other = tmp_path / "other.tif"
    other.write_bytes(b"")
    assert find_images([other, tmp_path / "in"]) == [other, tmp_path / "in/a.jpg", tmp_path / "in/b.PNG"]


def test_a_damaged_image_is_named_and_the_images_before_it_are_kept(loaded, tmp_path):
    save_image(tmp_path / "in/a.png", 64, 64)
    whole = (tmp_path / "in/a.png").read_bytes()
    (tmp_path / "in/b.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"in/b\.png"):
        list(predict_files(loaded, None, [tmp_path / "in"], tmp_path / "out", CPU))
    assert (tmp_path / "out/a.png").exists()
    assert not (tmp_path / "out/b.png").exists()


def refused(loaded, inputs, out, network=None):
    with pytest.raises(InputError) as caught:
        list(predict_files(loaded, network, inputs, out, CPU))
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
    assert "has no ema, only teacher, student" in refused(loaded, [tmp_path / "empty"], out, "ema")


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
