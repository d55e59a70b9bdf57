"""`prcl analyse`: written files, chosen checkpoints and subsets, mistakes."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from prcl_fast.analysis.prototype_path import logged_shift, prototype_path
from prcl_fast.analysis.style import new_figure
from prcl_fast.cli.analyse import analyse_command
from prcl_fast.cli.main import main
from prcl_fast.config import parse_config
from prcl_fast.engine.trainer import Trainer
from prcl_fast.errors import InputError
from prcl_fast.runs.checkpoint import find_checkpoint, load_checkpoint, load_run, save_checkpoint
from support.run_folders import write_metrics, write_run
from support.tiny import tiny_tree

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
    """Loads a run once, because loading takes most of the time; no test modifies it."""
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


def test_a_run_gets_numbers_and_pictures_and_the_last_line_is_json(run, capsys):
    analyse(run)
    lines = capsys.readouterr().out.splitlines()
    summary = json.loads(lines[-1])
    folder = run / "analysis"
    assert sorted(path.name for path in folder.iterdir()) == ["analysis.json", "prototypes.png", "tsne.png"]
    result = result_of(folder)
    keys = ["silhouette", "davies_bouldin", "intra_variance", "inter_variance"]
    keys += ["trace_intra", "trace_inter", "trace_ratio"]
    metrics = result["metrics"]
    assert metrics["trace_ratio"] == pytest.approx(metrics["trace_inter"] / metrics["trace_intra"])
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
    monkeypatch.setattr("prcl_fast.data.sources.synthetic.SyntheticSource.label", none)
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
    for wrong in ([0.5], "far", None, [[0.1]] * classes, [10**400] * classes):
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
    assert "subset: 'vall' is not one of labeled" in refused(run, subset="vall", out=out)
    assert "by: 'truth' is not one of label" in refused(run, by="truth", out=out)
    assert "analyse takes data.* only" in refused(run, "model.dim=4", out=out)
    assert "no such run or checkpoint" in refused(run, "later.pt", out=out)
    assert "has no ema, only teacher, student" in refused(run, network="ema", out=out)
    assert "pixels: 0 is less than 1" in refused(run, pixels=0, out=out)
    assert "pixels: 1 of each class give" in refused(run, pixels=1, out=out)
    assert "seed: -1 is negative" in refused(run, seed=-1, out=out)
    assert not out.exists()
    out.write_text("")
    assert "is not a folder" in refused(run, out=out)
    assert "cannot be written" in refused(run, out=out / "deeper")


def test_an_image_of_one_class_is_too_little(run, tmp_path, monkeypatch):
    label = "prcl_fast.data.sources.synthetic.SyntheticSource.label"
    monkeypatch.setattr(label, lambda self, name: np.full((64, 64), 255, np.uint8))
    assert "labeled pixels of at least 2 classes are needed; found: none" in refused(run, out=tmp_path / "o")
    monkeypatch.setattr(label, lambda self, name: np.zeros((64, 64), np.uint8))
    assert "found: background" in refused(run, out=tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_checkpoint_of_another_run_or_other_classes_is_refused(run, tmp_path):
    write_run(tmp_path / "other", tiny_tree(tmp_path / "other", prototype="ema", tau=9.0))
    message = refused(run, str(tmp_path / "other/best.pt"), out=tmp_path / "o")
    assert "best.pt: is of another run than" in message
    # A run that was extended has checkpoints of both totals.
    state = load_checkpoint(run / "last.pt")
    train = state["config"]["train"] | {"iterations": 9}
    longer = state | {"iteration": 3, "config": state["config"] | {"train": train}}
    save_checkpoint(tmp_path / "longer.pt", longer)
    path = prototype_path(run / "last.pt", [tmp_path / "longer.pt"], lambda _: None)
    assert [point.iteration for point in path] == [2, 3]
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


def test_the_runs_threads_are_those_of_the_networks_and_of_t_sne(run, tmp_path, monkeypatch, capsys):
    seen = []

    @contextlib.contextmanager
    def limits(threads):
        seen.append(("limit", threads))
        yield
        seen.append("end")

    def draw(*_):
        seen.append("t-SNE")
        return new_figure(1, 1)

    report = "prcl_fast.analysis.embedding_report"
    monkeypatch.setattr(f"{report}.threadpool_limits", limits)
    monkeypatch.setattr(f"{report}.draw_tsne", draw)
    monkeypatch.setattr(f"{report}.draw_prototypes", lambda *_: new_figure(1, 1))
    monkeypatch.setattr(
        f"{report}.prepare_device", lambda device, threads, tf32: seen.append(("device", threads))
    )
    analyse(run, out=tmp_path / "out")
    assert seen == [("device", 1), ("limit", 1), "t-SNE", "end"]
    assert "t-SNE of " in capsys.readouterr().err
