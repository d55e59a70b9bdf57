"""Drawn pixels of `prcl analyse`, their network outputs, and the prototypes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prcl_fast.analysis.embedding import embed, label_at_resolution, label_maps
from prcl_fast.analysis.prototypes import pixel_prototypes, stored_prototypes, stored_virtual_negatives
from prcl_fast.config import parse_config
from prcl_fast.data.pixel_draws import draw_pixels
from prcl_fast.data.sources import build_source
from prcl_fast.engine.inference import inference
from prcl_fast.runs.checkpoint import load_checkpoint, load_run
from support.run_folders import write_run
from support.tiny import tiny_tree

CPU = torch.device("cpu")


def maps(seed=3, count=6):
    rng = np.random.default_rng(seed)
    return [rng.choice([0, 1, 2, 255], (9, 7), p=[0.7, 0.2, 0.02, 0.08]) for _ in range(count)]


def test_each_class_gives_its_pixels_without_repetition_and_ignored_ones_none():
    classes = maps()
    drawn = draw_pixels([(each, each) for each in classes], 20, seed=5)
    total = {c: sum(int((each == c).sum()) for each in classes) for c in (0, 1, 2)}
    assert {c: int((drawn.group == c).sum()) for c in (0, 1, 2)} == {c: min(20, n) for c, n in total.items()}
    assert total[2] < 20
    assert set(drawn.group) == {0, 1, 2}
    places = list(zip(drawn.image, drawn.row, drawn.column, strict=True))
    assert len(set(places)) == len(places)
    assert places == sorted(places)
    assert [classes[i][y, x] for i, y, x in places] == drawn.group.tolist() == drawn.truth.tolist()


def test_pixels_are_drawn_uniformly_over_all_images():
    classes = [np.zeros((10, 10), np.int64) for _ in range(4)]
    seen = np.zeros((4, 10, 10))
    for seed in range(200):
        drawn = draw_pixels([(each, None) for each in classes], 40, seed)
        seen[drawn.image, drawn.row, drawn.column] += 1
    share = seen / 200  # 0.1 on average, standard deviation 0.021
    assert share.mean() == pytest.approx(0.1)
    assert np.abs(share.mean(axis=(1, 2)) - 0.1).max() < 0.01
    assert share.max() < 0.1 + 5 * 0.0212
    places = [set(zip(drawn.row[own], drawn.column[own], strict=True)) for own in drawn.image == [[0], [1]]]
    assert len(places[0] & places[1]) < 6  # each image has numbers of its own


def test_one_seed_gives_the_same_pixels_and_other_classes_change_only_their_own():
    classes = maps()
    first = draw_pixels([(each, each) for each in classes], 20, seed=5)
    changed = [np.where(each == 2, 1, each) for each in classes]
    second = draw_pixels([(each, None) for each in changed], 20, seed=5)
    third = draw_pixels([(each, each) for each in classes], 20, seed=6)

    def zeros(drawn):
        own = drawn.group == 0
        return list(zip(drawn.image[own], drawn.row[own], drawn.column[own], strict=True))

    assert zeros(first) == zeros(second) != zeros(third)
    assert second.truth is None


def test_labels_are_read_where_upsampling_puts_the_decoders_pixels():
    label = np.arange(65 * 34).reshape(65, 34)
    small = label_at_resolution(label, (17, 9))
    assert small.shape == (17, 9)
    assert small[:, 0].tolist() == label[::4, 0].tolist()  # 16 steps over 64 pixels
    assert (small[0, 0], small[-1, -1]) == (label[0, 0], label[-1, -1])
    assert small[0].tolist() == np.rint(np.linspace(0, 33, 9)).astype(int).tolist()


@pytest.mark.parametrize("method", ["prcl", "supervised"])
def test_an_embedding_holds_what_the_network_says_at_the_drawn_pixels(tmp_path, method):
    write_run(tmp_path, tiny_tree(tmp_path, name=method))
    loaded = load_run(tmp_path, CPU)
    source = build_source(loaded.config.data)
    names = source.splits["val"].names
    network = loaded.networks["student"]
    drawn = draw_pixels(label_maps(source, names), 7, seed=0)
    embedding = embed(network, source, names, drawn, loaded.config, CPU, lambda done, total: None)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (loaded.config.data.mean, loaded.config.data.std))
    for place in (0, len(drawn.image) // 2, len(drawn.image) - 1):
        index, row, column = drawn.image[place], drawn.row[place], drawn.column[place]
        image = torch.from_numpy(source.image(names[index])).permute(2, 0, 1)[None] / 255
        with inference([network], CPU, "off"):
            output = network((image - mean) / std)
        expected = output.features if method == "supervised" else output.mu
        np.testing.assert_allclose(
            embedding.representation[place], expected[0, :, row, column], rtol=1e-3, atol=1e-5
        )
        assert embedding.prediction[place] == output.logits[0, :, row, column].argmax()
        if method == "prcl":
            np.testing.assert_allclose(embedding.variance[place], output.var[0, :, row, column], rtol=1e-4)
        truth = source.label(names[index])
        rows, columns = (np.rint(np.linspace(0, side - 1, -(-side // 4))).astype(int) for side in truth.shape)
        assert drawn.truth[place] == truth[rows[row], columns[column]]
    assert embedding.kind == ("features" if method == "supervised" else "mu")
    assert (embedding.variance is None) == (method == "supervised")
    weight = 1 if embedding.variance is None else 1 / embedding.variance
    own = drawn.group == drawn.group[0]
    expected = (weight * embedding.representation)[own].sum(0) / (
        np.ones_like(embedding.representation) * weight
    )[own].sum(0)
    prototypes = pixel_prototypes(embedding, drawn, len(loaded.classes))
    np.testing.assert_allclose(prototypes.mean[drawn.group[0], 0], expected, rtol=1e-4, atol=1e-6)
    absent = np.setdiff1d(np.arange(len(loaded.classes)), drawn.group)
    assert np.isnan(prototypes.mean[absent]).all()


@pytest.mark.parametrize("kind", ["ema", "global"])
def test_stored_prototypes_and_virtual_negatives_are_those_of_the_runs_state(tmp_path, kind):
    method = parse_config(tiny_tree(tmp_path, prototype=kind, beta=2.0, virtual_negatives=400), "test").method
    mean = torch.tensor([[1.0, 2], [3, 4], [5, 6]], dtype=torch.float64)
    variance = torch.tensor([[0.5, 0.25], [0.1, 0.2], [1, 1]], dtype=torch.float64)
    state = {"contrast.count": torch.tensor([10, 20, 0])}
    state |= {"contrast.precision": 1 / variance, "contrast.weighted_mean": mean / variance}
    if kind == "ema":  # its virtual negatives come from the GDP all the same
        state |= {"contrast.mean": mean + 10, "contrast.variance": 9 * variance}
    prototypes = stored_prototypes(method, state)
    np.testing.assert_allclose(prototypes.mean[:2, 0], mean[:2] + (10 if kind == "ema" else 0))
    assert np.isnan(prototypes.mean[2]).all()
    virtual = stored_virtual_negatives(method, state, seed=1)
    assert virtual.shape == (3, method.virtual_negatives, 2)
    assert np.isnan(virtual[2]).all()
    noise = (virtual[:2] - mean[:2, None].numpy()) / (2.0 * variance[:2, None].numpy())
    assert np.abs(noise.mean(axis=1)).max() < 0.25  # five standard deviations
    assert np.abs(noise.std(axis=1) - 1).max() < 0.18
    assert len(np.unique(noise.round(6))) == noise.size


def test_stored_prototypes_of_pcr_are_all_of_every_class(tmp_path):
    method = parse_config(tiny_tree(tmp_path, name="pcr", prototypes=2, warmup=1), "test").method
    stored = torch.arange(12, dtype=torch.float32).view(3, 2, 2)
    state = {"predictor.prototypes": stored, "predictor.known": torch.tensor([True, True, False])}
    prototypes = stored_prototypes(method, state)
    np.testing.assert_array_equal(prototypes.mean[:2], stored[:2])
    assert np.isnan(prototypes.mean[2]).all()
    assert "student's pixels" in prototypes.origin
    assert stored_virtual_negatives(method, state, 0) is None


@pytest.mark.parametrize("features", ["decoder", "aspp"])
def test_an_embedding_of_pcr_lies_where_its_prototypes_do(tmp_path, features):
    write_run(tmp_path, tiny_tree(tmp_path, name="pcr", features=features, warmup=1))
    loaded = load_run(tmp_path, CPU)
    source = build_source(loaded.config.data)
    names = source.splits["val"].names
    drawn = draw_pixels(label_maps(source, names), 5, seed=0)
    network = loaded.networks["teacher"]
    embedding = embed(network, source, names, drawn, loaded.config, CPU, lambda done, total: None)
    stored = load_checkpoint(tmp_path / "best.pt")["method"]["predictor.prototypes"]
    assert embedding.representation.shape[1] == stored.shape[-1] == (32 if features == "decoder" else 16)
    image = torch.from_numpy(source.image(names[drawn.image[0]])).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (loaded.config.data.mean, loaded.config.data.std))
    with inference([network], CPU, "off"):
        expected = network((image - mean) / std).features[
            0, -stored.shape[-1] :, drawn.row[0], drawn.column[0]
        ]
    np.testing.assert_allclose(embedding.representation[0], expected, rtol=1e-3, atol=1e-5)


def test_a_run_without_kept_prototypes_or_virtual_negatives_has_none(tmp_path):
    local = parse_config(tiny_tree(tmp_path, prototype="local", virtual_negatives=0), "test").method
    assert stored_prototypes(local, {}) is None
    supervised = parse_config(tiny_tree(tmp_path, name="supervised"), "test").method
    assert stored_prototypes(supervised, {}) is None
    assert stored_virtual_negatives(local, {}, 0) is None
    assert stored_virtual_negatives(supervised, {}, 0) is None
