"""`prcl analyse`: its numbers against plain transcriptions, the drawn pixels, what is written, mistakes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_tree
from PIL import Image
from rich.console import Console
from run_folders import write_metrics, write_run

from prcl_fast.analysis.cluster_quality import (
    cluster_quality,
    normalized,
    rank_correlation,
    ranks,
    variance_auroc,
)
from prcl_fast.analysis.embedding import at_resolution, draw_pixels, embed, label_maps
from prcl_fast.analysis.embedding_figures import Space, draw_prototypes, draw_tsne
from prcl_fast.analysis.prototype_path import logged_shift
from prcl_fast.analysis.prototypes import pixel_prototypes, stored_prototypes, virtual_negatives
from prcl_fast.analysis.style import new_figure
from prcl_fast.cli.analyse import analyse_command
from prcl_fast.cli.main import main
from prcl_fast.config import parse_config
from prcl_fast.data.source import build_source
from prcl_fast.engine.checkpoint import find_checkpoint, load_checkpoint, load_run, save_checkpoint
from prcl_fast.engine.inference import inference
from prcl_fast.engine.trainer import Trainer
from prcl_fast.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of PRCL with EMA prototypes: best.pt and last.pt of iteration 2, last-1.pt of iteration 1."""
    folder = tmp_path_factory.mktemp("analyse") / "run"
    tree = tiny_tree(folder, prototype="ema")
    tree["train"] |= {"iterations": 2, "log_every": 1, "eval_every": 2, "save_every": 1}
    Trainer(parse_config(tree, "test"), Console(quiet=True)).run()
    return folder


@pytest.fixture(scope="module", autouse=True)
def each_checkpoint_is_read_once():
    """Reading takes longer than looking; nothing here writes into what was read."""
    known = {}

    def once(read):
        def cached(path, *rest):
            file = find_checkpoint(path)
            state = file.stat()
            key = read, file, state.st_ino, state.st_mtime_ns
            if key not in known:
                known[key] = read(path, *rest)
            return known[key]

        return cached

    with pytest.MonkeyPatch.context() as patch:
        for where, read in (("embedding_report", load_run), ("prototype_path", load_checkpoint)):
            patch.setattr(f"prcl_fast.analysis.{where}.{read.__name__}", once(read))
        yield


@pytest.fixture
def no_pictures(monkeypatch):
    """For tests of the numbers: the figures are empty, t-SNE is not run."""
    for name in ("draw_tsne", "draw_prototypes"):
        monkeypatch.setattr(f"prcl_fast.analysis.embedding_report.{name}", lambda *_: new_figure(1, 1))


def analyse(run, *rest, **options):
    arguments = {"out": None, "subset": "val", "pixels": 20, "by": "label", "network": None, "seed": 0}
    analyse_command(run, list(rest), **arguments | options, device="cpu")


def result_of(folder):
    return json.loads((folder / "analysis.json").read_text())


def points(seed=0):
    """Three classes of unequal size among five, in 4 dimensions and of various lengths."""
    rng = np.random.default_rng(seed)
    group = np.repeat([0, 1, 3], [4, 7, 5])
    x = (rng.normal(size=(16, 4)) + 2 * np.eye(4)[group]) * rng.uniform(0.1, 9, (16, 1))
    return x, group


def test_silhouette_and_davies_bouldin_are_those_of_unit_vectors():
    x, group = points()
    unit = x / np.sqrt((x**2).sum(1, keepdims=True))
    distance = np.sqrt(((unit[:, None] - unit[None]) ** 2).sum(-1))
    scores = []
    for i, own in enumerate(group):
        a = distance[i, group == own].sum() / ((group == own).sum() - 1)
        b = min(distance[i, group == other].mean() for other in {0, 1, 3} - {own})
        scores.append((b - a) / max(a, b))
    means = {c: unit[group == c].mean(0) for c in (0, 1, 3)}
    spread = {c: np.sqrt(((unit[group == c] - means[c]) ** 2).sum(1)).mean() for c in means}
    worst = [
        max((spread[i] + spread[j]) / np.sqrt(((means[i] - means[j]) ** 2).sum()) for j in means if j != i)
        for i in means
    ]
    quality = cluster_quality(x.astype(np.float64), group, 5)
    assert quality.silhouette == pytest.approx(np.mean(scores), rel=1e-9)
    assert quality.davies_bouldin == pytest.approx(np.mean(worst), rel=1e-9)


def test_every_class_counts_alike_in_intra_and_inter_variance():
    x, group = points(1)
    unit = x / np.sqrt((x**2).sum(1, keepdims=True))
    means = np.array([unit[group == c].mean(0) for c in (0, 1, 3)])
    within = [((unit[group == c] - unit[group == c].mean(0)) ** 2).sum(1).mean() for c in (0, 1, 3)]
    quality = cluster_quality(x, group, 5)
    np.testing.assert_allclose(quality.intra_by_class, [within[0], within[1], np.nan, within[2], np.nan])
    assert quality.intra_variance == pytest.approx(np.mean(within))
    assert quality.inter_variance == pytest.approx(((means - means.mean(0)) ** 2).sum(1).mean())


def test_a_vector_of_zeros_stays_zero_when_lengths_become_one():
    assert normalized(np.array([[3.0, 4], [0, 0]])).tolist() == [[0.6, 0.8], [0, 0]]


def test_auroc_is_the_share_of_pairs_in_which_the_mistake_is_the_less_certain():
    variance = np.array([0.1, 0.5, 0.3, 0.3, 0.9])
    wrong = np.array([False, True, True, False, False])
    pairs = [
        (0.5 if v == w else float(v > w)) for v in variance[wrong] for w in variance[~wrong]
    ]  # mistakes against right ones
    assert variance_auroc(variance, wrong) == pytest.approx(np.mean(pairs))
    assert variance_auroc(variance, np.zeros(5, bool)) is None
    assert variance_auroc(variance, np.ones(5, bool)) is None


def test_ranks_share_ties_and_their_correlation_leaves_out_unknown_values():
    values = np.array([0.3, np.nan, 0.1, 0.3, 0.2])
    np.testing.assert_array_equal(ranks(values), [3.5, np.nan, 1, 3.5, 2])
    falling = np.array([1.0, 5, 9, 1, 4])
    assert rank_correlation(values, falling) == pytest.approx(-1)
    assert rank_correlation(values, np.ones(5)) is None
    assert rank_correlation(values[:3], falling[:3]) is None  # two pairs say nothing


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
    small = at_resolution(label, (17, 9))
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
    np.testing.assert_allclose(prototypes.mean[drawn.group[0]], expected, rtol=1e-4, atol=1e-6)
    absent = np.setdiff1d(np.arange(len(loaded.classes)), drawn.group)
    assert np.isnan(prototypes.mean[absent]).all()


@pytest.mark.parametrize("kind", ["ema", "global"])
def test_stored_prototypes_and_virtual_negatives_are_those_of_the_runs_state(tmp_path, kind):
    method = parse_config(tiny_tree(tmp_path, prototype=kind, beta=2.0, virtual_negatives=400), "test").method
    mean = torch.tensor([[1.0, 2], [3, 4], [5, 6]], dtype=torch.float64)
    variance = torch.tensor([[0.5, 0.25], [0.1, 0.2], [1, 1]], dtype=torch.float64)
    state = {"contrast.count": torch.tensor([10, 20, 0])}
    if kind == "ema":
        state |= {"contrast.mean": mean, "contrast.variance": variance}
    else:
        state |= {"contrast.precision": 1 / variance, "contrast.weighted_mean": mean / variance}
    prototypes = stored_prototypes(method, state)
    np.testing.assert_allclose(prototypes.mean[:2], mean[:2])
    assert np.isnan(prototypes.mean[2]).all()
    virtual = virtual_negatives(prototypes, method, seed=1)
    assert virtual.shape == (3, method.virtual_negatives, 2)
    assert np.isnan(virtual[2]).all()
    noise = (virtual[:2] - mean[:2, None].numpy()) / (2.0 * variance[:2, None].numpy())
    assert np.abs(noise.mean(axis=1)).max() < 0.25  # five standard deviations
    assert np.abs(noise.std(axis=1) - 1).max() < 0.18
    assert len(np.unique(noise.round(6))) == noise.size


def test_a_run_without_kept_prototypes_or_virtual_negatives_has_none(tmp_path):
    local = parse_config(tiny_tree(tmp_path, prototype="local", virtual_negatives=0), "test").method
    assert stored_prototypes(local, {}) is None
    supervised = parse_config(tiny_tree(tmp_path, name="supervised"), "test").method
    assert stored_prototypes(supervised, {}) is None
    kept = stored_prototypes(
        parse_config(tiny_tree(tmp_path, prototype="ema"), "test").method,
        {
            "contrast.count": torch.ones(2),
            "contrast.mean": torch.ones(2, 3),
            "contrast.variance": torch.ones(2, 3),
        },
    )
    assert virtual_negatives(kept, local, 0) is None
    assert virtual_negatives(kept, supervised, 0) is None


def space(**changes):
    x, group = points()
    prototypes = np.full((5, 4), np.nan)
    prototypes[[0, 1, 3]] = [x[group == c].mean(0) for c in (0, 1, 3)]
    virtual = np.repeat(prototypes[:, None], 2, axis=1) * 1.01
    palette = np.array([[0, 0, 0], [250, 0, 0], [0, 250, 0], [0, 0, 250], [9, 9, 9]], np.uint8)
    values = {
        "classes": tuple("abcde"),
        "palette": palette,
        "representation": x,
        "group": group,
        "by": "true class",
        "prototypes": prototypes,
        "virtual": virtual,
        "variance": np.linspace(0.2, 0.6, 16),
        "wrong": np.arange(16) % 4 == 0,
    }
    return Space(**values | changes)


def drawn_points(collection):
    return np.asarray(collection.get_offsets())[~np.isnan(np.asarray(collection.get_offsets())).any(1)]


def test_tsne_shows_pixels_prototypes_and_virtual_negatives_in_the_colours_of_their_classes():
    figure = draw_tsne(space(), seed=0)
    pixels, stars, crosses = figure.axes[0].collections
    assert [len(drawn_points(part)) for part in (pixels, stars, crosses)] == [16, 3, 6]
    np.testing.assert_allclose(pixels.get_facecolors()[:, :3], space().palette[space().group] / 255)
    np.testing.assert_allclose(crosses.get_facecolors()[:, :3], np.repeat(space().palette, 2, axis=0) / 255)
    assert figure.axes[1].get_title("left").endswith("predicted wrongly (25 %)")
    ringed = drawn_points(figure.axes[1].collections[1])
    np.testing.assert_array_equal(ringed, drawn_points(pixels)[::4])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["a", "b", "d", "prototype", "virtual negative"]
    again = draw_tsne(space(), seed=0).axes[0].collections[0]
    np.testing.assert_array_equal(drawn_points(again), drawn_points(pixels))
    plain = draw_tsne(space(virtual=None, variance=None, wrong=None), seed=0)
    assert len(plain.axes) == 1
    assert [text.get_text() for text in plain.legends[0].get_texts()][-1] == "prototype"


def test_paths_lead_to_the_star_of_the_last_checkpoint_in_one_projection():
    prototypes = space().prototypes
    first = np.where(np.arange(5)[:, None] == 1, np.nan, prototypes[:, ::-1])
    figure = draw_prototypes(space(), [10, 20], np.stack([first, prototypes]), None)
    lengths = [len(line.get_xdata()) for line in figure.axes[0].get_lines()]
    assert lengths == [2, 1, 2]  # class b had no prototype at iteration 10
    stars = figure.axes[0].collections[1:]
    for line, star in zip(figure.axes[0].get_lines(), stars, strict=True):
        np.testing.assert_allclose(line.get_xydata()[-1], drawn_points(star)[0])
    assert "iteration 10 to 20" in figure.axes[0].get_title("left")
    shift = (
        np.array([5, 10]),
        np.array([[0.1, np.nan, np.nan, 0.3, np.nan], [0.05, 0.2, np.nan, 0.1, np.nan]]),
    )
    figure = draw_prototypes(space(), [20], prototypes[None], shift)
    assert [line.get_ydata()[-1] for line in figure.axes[1].get_lines()][::3] == [0.05, 0.1]


def test_a_run_gets_numbers_and_pictures_and_the_last_line_is_json(run, capsys):
    analyse(run)
    lines = capsys.readouterr().out.splitlines()
    summary = json.loads(lines[-1])
    folder = run / "analysis"
    assert sorted(path.name for path in folder.iterdir()) == ["analysis.json", "prototypes.png", "tsne.png"]
    result = result_of(folder)
    keys = ("silhouette", "davies_bouldin", "intra_variance", "inter_variance")
    assert summary == {key: result["metrics"][key] for key in keys} | {"output": str(folder)}
    assert set(keys) <= result["definitions"].keys()
    assert (result["network"], result["representation"]["kind"]) == ("teacher", "mu")
    assert result["representation"]["dim"] == 8
    assert all(0 < row["pixels"] <= 20 and 0 < row["variance_mean"] < 1 for row in result["classes"])
    assert any(row["name"] in line for line in lines for row in result["classes"])
    evaluation = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert evaluation["kind"] == "eval"
    assert {row["name"]: row["iou"] for row in result["classes"]}.items() <= evaluation["iou"].items()
    rows = result["classes"]
    assert max(rows, key=lambda row: row["iou"]) == min(rows, key=lambda row: row["iou_rank"])
    assert min(rows, key=lambda row: row["variance_mean"])["variance_rank"] == 1
    for name in ("tsne.png", "prototypes.png"):
        with Image.open(folder / name) as png:
            assert len(png.convert("RGB").getcolors(1 << 24)) > 50


def test_numbers_are_repeatable_and_the_seed_draws_other_pixels(run, tmp_path, no_pictures):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        analyse(run / "last.pt", out=tmp_path / name, seed=seed)
    first, again, other = (result_of(tmp_path / name) for name in "abc")
    assert first == again
    assert first["metrics"] != other["metrics"]
    assert [entry["iteration"] for entry in first["prototypes"]["checkpoints"]] == [2]  # a file stands alone


def test_all_checkpoints_of_a_folder_and_further_ones_make_the_path(run, tmp_path, no_pictures):
    def iterations(folder):
        return [entry["iteration"] for entry in result_of(folder)["prototypes"]["checkpoints"]]

    analyse(run, out=tmp_path / "folder")
    assert iterations(tmp_path / "folder") == [1, 2]
    analyse(run / "last.pt", str(run / "last-1.pt"), out=tmp_path / "two")
    earlier, later = result_of(tmp_path / "two")["prototypes"]["checkpoints"]
    assert (earlier["iteration"], later["iteration"]) == (1, 2)
    means = [load_checkpoint(run / name)["method"]["contrast.mean"] for name in ("last-1.pt", "last.pt")]
    counts = load_checkpoint(run / "last-1.pt")["method"]["contrast.count"]
    moved = torch.linalg.norm(
        torch.nn.functional.normalize(means[1]) - torch.nn.functional.normalize(means[0]), dim=1
    )
    for expected, count, value in zip(moved, counts, later["moved"].values(), strict=True):
        assert value is None if count == 0 else value == pytest.approx(float(expected), abs=1e-5)
    assert set(earlier["moved"].values()) == {None}


def test_classes_may_be_the_predicted_ones_and_unlabeled_images_need_no_label(
    run, tmp_path, monkeypatch, no_pictures
):
    def none(self, name):
        raise AssertionError("a label was read")

    analyse(run, out=tmp_path / "val", by="prediction")
    assert result_of(tmp_path / "val")["metrics"]["wrong_share"] is not None
    monkeypatch.setattr("prcl_fast.data.synthetic.SyntheticSource.label", none)
    analyse(run, out=tmp_path / "unlabeled", by="prediction", subset="unlabeled", network="student")
    result = result_of(tmp_path / "unlabeled")
    assert result["metrics"]["wrong_share"] is None
    assert result["metrics"]["variance_auroc"] is None
    assert result["data"]["images"] == 6
    assert all(row["iou"] is None for row in result["classes"])  # the log's is of the teacher


def test_a_method_without_representation_head_is_seen_through_its_features(tmp_path, capsys, no_pictures):
    write_run(tmp_path, tiny_tree(tmp_path, name="supervised"))
    write_metrics(tmp_path, "supervised")
    shutil.copy(tmp_path / "best.pt", tmp_path / "last.pt")
    state = load_checkpoint(tmp_path / "last.pt") | {"iteration": 50}
    for name in [key for key in state["method"] if key.endswith("low_level.0.weight")]:
        state["method"][name] = -state["method"][name]
    save_checkpoint(tmp_path / "last.pt", {k: v for k, v in state.items() if k not in ("format", "version")})
    analyse(tmp_path)
    result = result_of(tmp_path / "analysis")
    assert (result["network"], result["representation"]["kind"]) == ("student", "features")
    assert result["metrics"]["variance_auroc"] is None
    assert result["prototypes"]["origin"].startswith("mean of the drawn pixels")
    before, after = result["prototypes"]["checkpoints"]
    assert (before["iteration"], after["iteration"]) == (40, 50)
    assert max(value or 0 for value in after["moved"].values()) > 0.01  # each with its own network
    assert "sigma^2 finds" not in capsys.readouterr().out


def test_a_logged_shift_is_drawn_and_a_wrong_one_refused(run, tmp_path, no_pictures, monkeypatch):
    seen = []

    def recording(space, iterations, means, shift):
        seen.append(shift)
        return new_figure(1, 1)

    monkeypatch.setattr("prcl_fast.analysis.embedding_report.draw_prototypes", recording)
    shutil.copy(run / "last.pt", tmp_path / "last.pt")
    log = tmp_path / "metrics.jsonl"
    classes = len(load_checkpoint(run / "last.pt")["classes"])
    record = {"kind": "train", "iteration": 2, "prototype_shift": [0.5, None] + [0.1] * (classes - 2)}
    log.write_text(json.dumps(record) + "\n")
    analyse(tmp_path)
    iterations, shift = seen[0]
    assert iterations.tolist() == [2]
    np.testing.assert_array_equal(shift, [[0.5, np.nan] + [0.1] * (classes - 2)])
    for wrong in ([0.5], "far", None, [[0.1]] * classes):
        log.write_text(json.dumps(record | {"prototype_shift": wrong}) + "\n")
        with pytest.raises(InputError, match=r"metrics\.jsonl: prototype_shift: expected a number for each"):
            logged_shift(tmp_path, classes)
    assert logged_shift(tmp_path / "nowhere", classes) is None


def refused(*arguments, **options):
    with pytest.raises(InputError) as caught:
        analyse(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_mistakes_get_one_line_and_nothing_is_written(run, tmp_path, no_pictures):
    out = tmp_path / "out"
    assert "no such run" in refused(tmp_path / "none", out=out)
    assert "subset: 'vall' is not one of val" in refused(run, subset="vall", out=out)
    assert "by: 'truth' is not one of label" in refused(run, by="truth", out=out)
    assert "analyse takes data.* only" in refused(run, "model.dim=4", out=out)
    assert "no such run or checkpoint" in refused(run, "later.pt", out=out)
    assert "has no ema, only teacher, student" in refused(run, network="ema", out=out)
    assert "pixels: 0 is not a number" in refused(run, pixels=0, out=out)
    assert "pixels: 1 of a class give" in refused(run, pixels=1, out=out)
    assert "seed: -1 is negative" in refused(run, seed=-1, out=out)
    assert not out.exists()
    out.write_text("")
    assert "is not a folder" in refused(run, out=out)
    assert "cannot be written" in refused(run, out=out / "deeper")


def test_an_image_of_one_class_is_too_little(run, tmp_path, monkeypatch):
    label = "prcl_fast.data.synthetic.SyntheticSource.label"
    monkeypatch.setattr(label, lambda self, name: np.full((64, 64), 255, np.uint8))
    assert "labeled pixels of at least 2 classes are needed, here are: none" in refused(
        run, out=tmp_path / "o"
    )
    monkeypatch.setattr(label, lambda self, name: np.zeros((64, 64), np.uint8))
    assert "here are: background" in refused(run, out=tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_checkpoint_of_another_run_or_other_classes_is_refused(run, tmp_path):
    write_run(tmp_path / "other", tiny_tree(tmp_path / "other", prototype="ema", tau=9.0))
    message = refused(run, str(tmp_path / "other/best.pt"), out=tmp_path / "o")
    assert "best.pt: is not of the run of" in message
    write_run(tmp_path / "four", tiny_tree(tmp_path / "four", name="supervised"), tuple("abcd"))
    assert "trained on other classes (a, b, c, d) than the data" in refused(tmp_path / "four")


def test_representations_that_are_all_the_same_or_not_finite_are_named(run, tmp_path):
    state = load_checkpoint(run / "last.pt")
    state = {key: value for key, value in state.items() if key not in ("format", "version", "optimizer")}
    state["optimizer"] = {}
    for value, line in ((0.0, "are the same"), (float("nan"), "are not finite")):
        for key in state["method"]:
            if "representation.3" in key:
                state["method"][key].fill_(value)
        save_checkpoint(tmp_path / "last.pt", state)
        assert line in refused(tmp_path)


def test_the_command_line_knows_it(run, tmp_path, monkeypatch, capsys, no_pictures):
    arguments = ["analyse", run / "last.pt", "data.synthetic.val=2", "--out", tmp_path, "--pixels", 12]
    monkeypatch.setattr(sys, "argv", ["prcl", *map(str, arguments), "--device", "cpu"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    assert Path(json.loads(capsys.readouterr().out.splitlines()[-1])["output"]) == tmp_path
    assert result_of(tmp_path)["data"]["images"] == 2
