"""Evaluation: exact counts, the three modes, averaging, independence of the batching."""

from __future__ import annotations

import io
import types
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from prcl_fast.config import DataConfig, EvalConfig
from prcl_fast.data.source import Split
from prcl_fast.engine.evaluate import Evaluation, evaluate, format_table
from prcl_fast.engine.inference import (
    inference_settings,
    logits_of,
    segmentation_of,
    window_starts,
)
from prcl_fast.errors import InputError, RunError

CPU = torch.device("cpu")
CLASSES = ("road", "car", "sky", "tree")


def data_config(crop=(24, 20), workers=0):
    return DataConfig(kind="synthetic", crop=list(crop), workers=workers)


class ArraySource:
    """Images whose red channel is the class to predict times 10, and given labels."""

    classes = CLASSES
    palette = np.zeros((4, 3), np.uint8)

    def __init__(self, predictions, labels):
        self.predictions = dict(enumerate(predictions))
        self.labels = dict(enumerate(labels))
        names = tuple(str(index) for index in self.predictions)
        self.splits = {"val": Split("arrays", names, "0" * 12)}

    def image(self, name):
        image = np.zeros((*self.predictions[int(name)].shape, 3), np.uint8)
        image[..., 0] = self.predictions[int(name)] * 10
        return image

    def label(self, name):
        return self.labels[int(name)]


class Pointwise(nn.Module):
    """The logits that make the argmax the class written in the red channel, at the image's resolution."""

    def __init__(self, data, classes=4):
        super().__init__()
        self.mean, self.std, self.classes = data.mean[0], data.std[0], classes
        self.calls = []
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x, representations=True):
        assert not self.training
        self.calls.append(tuple(x.shape))
        red = (x[:, :1] * self.std + self.mean) * 25.5
        wanted = torch.arange(self.classes, dtype=x.dtype).view(1, -1, 1, 1)
        return types.SimpleNamespace(logits=-((red - wanted) ** 2), mu=None, var=None)


def random_source(sizes, seed=0, ignored=0.1):
    rng = np.random.default_rng(seed)
    predictions = [rng.integers(0, 4, size, dtype=np.uint8) for size in sizes]
    labels = [rng.integers(0, 4, size, dtype=np.uint8) for size in sizes]
    for label in labels:
        label[rng.random(label.shape) < ignored] = 255
    return ArraySource(predictions, labels)


def counted(source, cut=lambda array: array):
    confusion = np.zeros((4, 4), np.int64)
    for index, label in source.labels.items():
        truth, prediction = cut(label), cut(source.predictions[index])
        for t, p in zip(truth.ravel(), prediction.ravel(), strict=True):
            if t != 255:
                confusion[t, p] += 1
    return confusion


SIZES = [(31, 40), (24, 20), (31, 40), (10, 50), (24, 20), (31, 40), (7, 9)]


@pytest.mark.parametrize("workers", [0, 3])
def test_confusion_counts_every_labeled_pixel_exactly(workers):
    source, data = random_source(SIZES), data_config(workers=workers)
    result = evaluate({"a": Pointwise(data)}, source, data, EvalConfig(batch=2), CPU)["a"]
    assert result.confusion.dtype == np.int64
    np.testing.assert_array_equal(result.confusion, counted(source))


def test_confusion_rows_are_truth_and_columns_prediction():
    source = ArraySource([np.full((8, 8), 2, np.uint8)], [np.full((8, 8), 1, np.uint8)])
    data = data_config()
    confusion = evaluate({"a": Pointwise(data)}, source, data, EvalConfig(), CPU)["a"].confusion
    assert confusion[1, 2] == 64
    assert confusion.sum() == 64


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_whose_output_is_not_finite_gets_no_iou(value):
    source, data = random_source(SIZES), data_config()
    broken = Pointwise(data)
    broken.mean = value
    message = r"^network b: its output is not finite at \d+ pixels"
    with pytest.raises(RunError, match=message):
        evaluate({"a": Pointwise(data), "b": broken}, source, data, EvalConfig(batch=2), CPU)


def test_sliding_equals_whole_for_a_pointwise_network():
    source, data = random_source(SIZES), data_config()
    for average in ("logits", "softmax"):
        settings = EvalConfig(mode="sliding", window=[16, 16], average=average, batch=3)
        result = evaluate({"a": Pointwise(data)}, source, data, settings, CPU)["a"]
        np.testing.assert_array_equal(result.confusion, counted(source))


def test_sliding_windows_never_exceed_the_batch_and_have_the_window_size():
    source, data = random_source([(31, 40), (7, 9)]), data_config()
    network = Pointwise(data)
    evaluate({"a": network}, source, data, EvalConfig(mode="sliding", batch=3), CPU)
    assert all(shape[0] <= 3 and shape[2:] == (24, 20) for shape in network.calls)  # null window: data.crop


def test_windows_cover_the_axis_and_stay_inside():
    for size in range(1, 70):
        for window in (1, 7, 16):
            for stride in (0.1, 2 / 3, 1.0):
                starts = window_starts(size, window, stride)
                covered = {pixel for start in starts for pixel in range(start, start + window)}
                assert covered >= set(range(size))
                assert len(set(starts)) == len(starts)
                assert starts == [0] if size <= window else max(covered) == size - 1
    assert window_starts(100, 40, 0.5) == [0, 20, 40, 60]
    assert window_starts(90, 40, 0.5) == [0, 20, 40, 50]


def test_center_cuts_the_middle_of_image_and_label_and_keeps_smaller_sides():
    source, data = random_source(SIZES), data_config()

    def cut(array):
        height, width = array.shape
        top, left = max(0, (height - 24) // 2), max(0, (width - 20) // 2)
        return array[top : top + 24, left : left + 20]

    network = Pointwise(data)
    result = evaluate({"a": network}, source, data, EvalConfig(mode="center"), CPU)["a"]
    np.testing.assert_array_equal(result.confusion, counted(source, cut))
    assert {shape[2:] for shape in network.calls} == {(24, 20), (10, 20), (7, 9)}


def test_counts_do_not_depend_on_batch_size_or_prefetch():
    source = random_source(SIZES * 3)
    data = data_config()
    expected = counted(source)
    for batch, workers in ((1, 0), (3, 2), (64, 1)):
        results = evaluate(
            {"a": Pointwise(data)}, source, data_config(workers=workers), EvalConfig(batch=batch), CPU
        )
        np.testing.assert_array_equal(results["a"].confusion, expected)


def test_images_of_one_size_share_a_batch_even_when_they_are_not_neighbours():
    source, data = random_source([(8, 8), (9, 9)] * 4), data_config()
    network = Pointwise(data)
    evaluate({"a": network}, source, data, EvalConfig(batch=4), CPU)
    assert network.calls == [(4, 3, 8, 8), (4, 3, 9, 9)]


def test_images_of_many_sizes_are_all_counted_with_few_waiting():
    source, data = random_source([(4 + index % 80, 5) for index in range(150)]), data_config(workers=2)
    result = evaluate({"a": Pointwise(data)}, source, data, EvalConfig(batch=4), CPU)["a"]
    np.testing.assert_array_equal(result.confusion, counted(source))


@pytest.mark.parametrize("world", [2, 3, 8])
def test_several_processes_see_the_batches_of_one_and_count_every_image_once(monkeypatch, world):
    source, data = random_source([(8, 8), (9, 9), (8, 8)] * 9), data_config()
    settings, alone = EvalConfig(batch=2), Pointwise(data)
    evaluate({"a": alone}, source, data, settings, CPU)
    calls, parts = [], []
    monkeypatch.setattr("prcl_fast.engine.evaluate.world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr("prcl_fast.engine.evaluate.rank", lambda rank=rank: rank)
        network = Pointwise(data)
        parts.append(evaluate({"a": network}, source, data, settings, CPU)["a"].confusion)
        calls += network.calls
    np.testing.assert_array_equal(sum(parts), counted(source))
    assert sorted(calls) == sorted(alone.calls)


def test_several_networks_see_the_same_images_and_get_their_mode_back():
    source, data = random_source(SIZES[:2]), data_config()
    teacher, student = Pointwise(data).eval(), Pointwise(data).train()
    student.norm.eval()  # a frozen layer inside a network that trains
    seen = []
    results = evaluate(
        {"teacher": teacher, "student": student},
        source,
        data,
        EvalConfig(),
        CPU,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert list(results) == ["teacher", "student"]
    assert teacher.calls == student.calls
    assert (teacher.training, student.training, student.norm.training) == (False, True, False)
    assert seen[-1] == (2, 2)


def test_modes_are_restored_after_an_error():
    source, data = random_source(SIZES[:1]), data_config()
    network = Pointwise(data, classes=3).train()
    with pytest.raises(InputError, match="network a: it has 3 classes, the data have 4"):
        evaluate({"a": network}, source, data, EvalConfig(), CPU)
    assert network.training


def test_a_label_of_another_size_is_named():
    source, data = random_source(SIZES[:2]), data_config(workers=2)
    source.labels[1] = source.labels[1][:-1]
    with pytest.raises(InputError, match=r"^1: the label is 23 x 20 pixels, the image 24 x 20$"):
        evaluate({"a": Pointwise(data)}, source, data, EvalConfig(), CPU)


def test_an_empty_subset_is_an_input_error():
    source, data = ArraySource([], []), data_config()
    with pytest.raises(InputError, match=r"data\.val"):
        evaluate({"a": Pointwise(data)}, source, data, EvalConfig(), CPU)


def test_absent_class_is_left_out_and_a_class_only_predicted_counts_as_zero():
    confusion = np.array([[3, 1, 0, 0], [1, 5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    result = Evaluation(confusion)
    np.testing.assert_allclose(result.iou, [3 / 5, 5 / 7, np.nan, np.nan])
    assert result.miou == pytest.approx(100 * (3 / 5 + 5 / 7) / 2)
    confusion[0, 2] = 2  # class 2 is predicted, never true
    assert Evaluation(confusion).miou == pytest.approx(100 * (3 / 7 + 5 / 7 + 0) / 3)
    by_class = Evaluation(confusion).iou_by_class(CLASSES)
    assert by_class == {
        "road": pytest.approx(300 / 7),
        "car": pytest.approx(500 / 7),
        "sky": 0.0,
        "tree": None,
    }
    assert np.isnan(Evaluation(np.zeros((4, 4), np.int64)).miou)


class Positional(nn.Module):
    """Two classes; the logits depend on the pixel's value and its place in the network's input."""

    def forward(self, x, representations=True):
        ramp = torch.linspace(0, 1, x.shape[3]).expand(x.shape[0], 1, *x.shape[2:])
        logits = torch.cat([ramp * x[:, :1], 1 - ramp], dim=1)
        return types.SimpleNamespace(logits=logits, features=ramp.expand(-1, 5, -1, -1))


def test_flip_averages_with_the_mirror_image():
    x = torch.rand(2, 3, 6, 7)
    network = Positional()
    plain = EvalConfig(average="logits")
    once = logits_of(network, x, plain)
    mirrored = logits_of(network, x.flip(3), plain).flip(3)
    both = logits_of(network, x, EvalConfig(average="logits", flip=True))
    torch.testing.assert_close(both, (once + mirrored) / 2)
    soft = logits_of(network, x, EvalConfig(average="softmax", flip=True))
    torch.testing.assert_close(soft, (once.softmax(1) + mirrored.softmax(1)) / 2)
    torch.testing.assert_close(soft.sum(1), torch.ones(2, 6, 7))


def test_scales_resize_the_image_and_average_at_the_size_of_the_image():
    x = torch.rand(1, 3, 8, 12)

    def resized(image, size):
        return torch.nn.functional.interpolate(image, size, mode="bilinear", align_corners=True)

    expected = [
        resized(Positional()(resized(x, size)).logits, (8, 12)) for size in ((4, 6), (8, 12), (12, 18))
    ]
    result = logits_of(Positional(), x, EvalConfig(average="logits", scales=[0.5, 1.0, 1.5]))
    torch.testing.assert_close(result, sum(expected) / 3)


def test_overlapping_windows_are_averaged_per_pixel():
    x = torch.ones(2, 3, 4, 6)
    settings = EvalConfig(mode="sliding", window=[4, 4], stride=0.5, average="logits", batch=3)
    ramp = torch.linspace(0, 1, 4)
    expected = torch.zeros(6)
    expected[:4] += ramp
    expected[2:] += ramp
    expected[2:4] /= 2
    result = logits_of(Positional(), x, settings)
    torch.testing.assert_close(result[:, 0], expected.expand(2, 4, 6))


def test_an_image_smaller_than_the_window_is_padded_with_the_mean_colour_and_cut_again():
    seen = []

    class Recorder(Positional):
        def forward(self, x, representations=True):
            seen.append(x)
            return super().forward(x)

    x = torch.ones(1, 3, 3, 9)
    result = logits_of(Recorder(), x, EvalConfig(mode="sliding", window=[5, 6], average="logits"))
    assert result.shape == (1, 2, 3, 9)
    assert all(view.shape[2:] == (5, 6) for view in seen)
    assert all((view[:, :, 3:] == 0).all() and (view[:, :, :3] == 1).all() for view in seen)


def test_logits_are_upsampled_with_aligned_corners_in_float32():
    class Coarse(nn.Module):
        def forward(self, x, representations=True):
            logits = torch.tensor([[0.0, 1.0], [2.0, 3.0]], dtype=torch.bfloat16)
            return types.SimpleNamespace(logits=logits.expand(1, 2, 2, 2))

    result = logits_of(Coarse(), torch.zeros(1, 3, 5, 5), EvalConfig(average="logits"))
    assert result.dtype == torch.float32
    grid = torch.arange(5) / 4
    torch.testing.assert_close(result[0, 0], 2 * grid[:, None] + grid[None])


@pytest.mark.parametrize("average", ["logits", "softmax"])
@pytest.mark.parametrize(
    "views",
    [
        {},
        {"scales": [0.5]},
        {"flip": True},
        {"scales": [0.5, 1.5]},
        {"mode": "sliding", "window": [4, 4], "batch": 3},
    ],
)
def test_segmentation_is_the_highest_of_the_scores(average: str, views: dict[str, Any]) -> None:
    class Random(nn.Module):
        def forward(self, x: torch.Tensor, representations: bool = True) -> types.SimpleNamespace:
            generator = torch.Generator().manual_seed(0)
            weight = torch.randn(5, 3, 2, 2, generator=generator)
            return types.SimpleNamespace(logits=torch.nn.functional.conv2d(x, weight, stride=2))

    x = torch.rand(2, 3, 10, 12, generator=torch.Generator().manual_seed(1))
    settings = EvalConfig(average=average, **views)
    scores = logits_of(Random(), x, settings)
    found = segmentation_of(Random(), x, settings)
    assert (found.num_classes, found.label.dtype) == (5, torch.uint8)
    torch.testing.assert_close(found.label.long(), scores.argmax(1))
    probability = scores if average == "softmax" else scores.softmax(1)
    torch.testing.assert_close(found.confidence, probability.amax(1))


@pytest.mark.parametrize("average", ["logits", "softmax"])
def test_variance_is_none_without_a_probability_head_and_is_averaged_as_the_scores_with_one(average):
    x = torch.rand(2, 3, 4, 6)
    network = Positional()
    network.probability = nn.Identity()
    ramp = torch.linspace(0, 1, 6)
    for views, expected in (
        ({}, ramp),
        ({"scales": [0.5]}, ramp),
        ({"flip": True}, (ramp + ramp.flip(0)) / 2),
        ({"mode": "sliding", "window": [4, 4], "stride": 0.5}, torch.tensor([0, 1, 1, 2, 2, 3]) / 3),
    ):
        settings = EvalConfig(average=average, **views)
        plain, found = (segmentation_of(one, x, settings) for one in (Positional(), network))
        assert plain.variance is None
        torch.testing.assert_close(found.variance, expected.expand(2, 4, 6))
        assert found.num_classes == plain.num_classes == 2
        assert torch.equal(found.label, plain.label)
        assert torch.equal(found.confidence, plain.confidence)


def test_null_window_and_crop_become_the_training_crop():
    settings = inference_settings(EvalConfig(window=[5, 6]), data_config(crop=(30, 40)))
    assert (settings.window, settings.crop) == ([5, 6], [30, 40])


def test_a_compiled_network_counts_like_the_plain_one():
    source, data = random_source(SIZES[:1]), data_config()
    network = Pointwise(data)
    compiled = []

    def backend(module, inputs):
        compiled.append(module)
        return module.forward

    network.compile(backend=backend)
    result = evaluate({"a": network}, source, data, EvalConfig(), CPU)["a"]
    np.testing.assert_array_equal(result.confusion, counted(source))
    assert not compiled


def test_table_shows_every_class_every_network_and_the_mean():
    confusion = np.array([[3, 1, 0, 0], [1, 5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    results = {"teacher": Evaluation(confusion), "student": Evaluation(confusion.T)}
    console = Console(file=io.StringIO(), width=80)
    console.print(format_table(results, CLASSES))
    text = console.file.getvalue()
    rows = {line.split()[1]: line for line in text.splitlines() if line.startswith("│")}
    assert list(rows) == [*CLASSES, "mean"]
    assert "40.00" in rows["road"]
    assert rows["road"].count("60.00") == 2
    assert rows["tree"].count("-") == 2
    assert rows["mean"].count("65.71") == 2
