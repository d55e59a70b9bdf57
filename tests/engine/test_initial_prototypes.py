"""The first prototypes of PCR from a trained network, Algorithm 2, against a plain transcription."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from prcl_fast.cli.main import main
from prcl_fast.config import dump_config, parse_config
from prcl_fast.engine import initial_prototypes
from prcl_fast.engine.trainer import InterruptedRunError, Trainer
from prcl_fast.errors import InputError
from prcl_fast.methods import PCR
from prcl_fast.runs.checkpoint import load_checkpoint, load_run
from support.plain_pcr import draw
from support.processes import Pair
from support.run_folders import write_run
from support.stub_networks import small_backbones
from support.tiny import shared_tree, tiny_tree

CPU = torch.device("cpu")
QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def _small_backbones() -> Iterator[None]:
    with small_backbones():
        yield


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """The folder of a finished supervised run."""
    return write_trained(tmp_path / "supervised", tiny_tree(tmp_path, name="supervised"))


def write_trained(folder: Path, tree: dict[str, Any], **more: Any) -> Path:
    write_run(folder, tree, **more)
    (folder / "best.pt").rename(folder / "last.pt")
    return folder


def pcr_tree(tmp_path: Path, source: Path, **method: Any) -> dict[str, Any]:
    method = {
        "name": "pcr",
        "prototypes": 2,
        "warmup": 0,
        "delta_u": 0.2,
        "prototypes_from": str(source),
    } | method
    return tiny_tree(tmp_path / "run", **method)


def made(tree: dict[str, Any]) -> tuple[Trainer, PCR]:
    trainer = Trainer(parse_config(tree, "tiny"), QUIET)
    assert isinstance(trainer.method, PCR)
    return trainer, trainer.method


def features_of_classes(trainer: Trainer, folder: Path, dim: int) -> list[Tensor]:
    """Algorithm 2, step 2, of every labeled pixel, by class: float64 [n, D] each."""
    network = load_run(folder, CPU).networks["student"]
    data, pixels = trainer.config.data, [[] for _ in trainer.source.classes]
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (data.mean, data.std))
    for name in trainer.source.splits["labeled"].names:
        image = torch.from_numpy(trainer.source.image(name)).permute(2, 0, 1)[None] / 255
        label = torch.from_numpy(trainer.source.label(name))
        with torch.no_grad():
            features = network((image - mean) / std).features[:, -dim:].double()
        full = F.interpolate(features, label.shape, mode="bilinear", align_corners=True)[0]
        for c in range(len(pixels)):
            pixels[c].append(full[:, label == c].T)
    return [torch.cat(rows) for rows in pixels]


@pytest.mark.parametrize("features", ["decoder", "aspp"])
def test_prototypes_are_the_means_of_the_clusters_of_a_trained_networks_features(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, features: str
) -> None:
    """Algorithm 2: features of labeled pixels at image size, K-means by class, the mean of each cluster."""
    monkeypatch.setattr(initial_prototypes, "SAMPLES", 4 * 64 * 64)  # every pixel
    trainer, method = made(pcr_tree(tmp_path, trained, features=features))
    prototypes = method.predictor.prototypes.double()
    pixels = features_of_classes(trainer, trained, prototypes.shape[2])
    assert method.predictor.known.tolist() == [len(rows) > 0 for rows in pixels]
    assert method.predictor.known.sum() >= 2
    for c, rows in enumerate(pixels):
        if len(rows):
            nearest = torch.cdist(rows, prototypes[c]).argmin(1)
            assert nearest.unique().tolist() == [0, 1]
            means = torch.stack([rows[nearest == k].mean(0) for k in (0, 1)])
            torch.testing.assert_close(prototypes[c], means, rtol=1e-4, atol=1e-5)
    # The student starts as without the key: Algorithm 2 returns only prototypes.
    alone = parse_config(pcr_tree(tmp_path / "other", trained, prototypes_from=None, warmup=1), "tiny")
    for own, other in zip(
        method.student.parameters(), Trainer(alone, QUIET).method.student.parameters(), strict=True
    ):
        assert torch.equal(own, other)


def test_the_pixels_drawn_are_as_many_of_each_class_and_of_that_class(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initial_prototypes, "SAMPLES", 40)
    seen = {}
    monkeypatch.setattr(
        PCR, "make_prototypes", lambda self, features, count: seen.update(f=features, n=count)
    )
    trainer, method = made(pcr_tree(tmp_path, trained))
    assert seen["f"].shape == (len(trainer.source.classes), 40, method.predictor.prototypes.shape[2])
    for rows, found, count in zip(
        features_of_classes(trainer, trained, 32), seen["f"], seen["n"], strict=True
    ):
        assert count == min(40, len(rows))
        if count:
            assert torch.cdist(found[:count].double(), rows).min(1).values.max() < 1e-4
            assert len(found[:count].unique(dim=0)) > count / 2


@pytest.mark.parametrize("predictor", ["both", "prototype"])
def test_a_run_learns_from_its_first_step_and_goes_on_without_the_trained_network(
    trained: Path, tmp_path: Path, predictor: str
) -> None:
    tree = pcr_tree(tmp_path, trained, predictor=predictor)
    tree["train"] |= {"accumulate": 2, "batch_labeled": 2, "batch_unlabeled": 4}
    trainer, method = made(tree)
    first = method.predictor.prototypes.clone()
    step = trainer.step

    def stopped(batches: Any) -> dict[str, Tensor]:
        trainer.stop.asked = trainer.iteration == 3
        return step(batches)

    trainer.step = stopped  # type: ignore[method-assign]
    with pytest.raises(InterruptedRunError):
        trainer.run()
    moved = method.predictor.prototypes
    assert not torch.equal(moved, first)
    shutil.rmtree(trained)
    again, method = made(tree)
    assert again.iteration == 4
    assert torch.equal(method.predictor.prototypes, moved)
    summary = again.run()
    assert summary["iterations"] == 6
    last = load_checkpoint(tmp_path / "run/last.pt")["progress"]["last"]
    assert ("miou_teacher_prototypes" in last) == (predictor == "both")
    learned = {p.requires_grad for p in method.student.classifier.parameters()}
    assert learned == {predictor == "both"}


def _first_prototypes(rank: int, tree: dict[str, Any]) -> dict[str, Tensor]:
    with small_backbones():
        _, method = made(tree)
    return {"prototypes": method.predictor.prototypes, "known": method.predictor.known}


def test_two_processes_make_the_prototypes_of_one(two: Pair, trained: Path, tmp_path: Path) -> None:
    tree = shared_tree(tmp_path / "two") | {"method": pcr_tree(tmp_path, trained)["method"]}
    parts = two(_first_prototypes, tree)
    whole = _first_prototypes(0, tree | {"output": str(tmp_path / "one")})
    for name, value in whole.items():
        assert torch.equal(parts[0][name], parts[1][name])
        assert torch.equal(parts[0][name], value)
    assert whole["known"].any()


def _three_steps(rank: int, tree: dict[str, Any]) -> dict[str, Tensor]:
    with small_backbones():
        trainer, method = made(tree)
    with contextlib.closing(trainer.batches()) as batches:
        losses = [trainer.step(batches) for _ in range(3)]
    assert all(value.isfinite() for step in losses for value in step.values())
    return {name: value.clone() for name, value in method.state_dict().items()}


def test_two_processes_learn_without_a_linear_predictor(two: Pair, trained: Path, tmp_path: Path) -> None:
    method = pcr_tree(tmp_path, trained, predictor="prototype")["method"]
    state, other = two(_three_steps, shared_tree(tmp_path / "two") | {"method": method})
    assert all(torch.equal(value, other[name]) for name, value in state.items())
    alone = _first_prototypes(0, shared_tree(tmp_path / "one") | {"method": method})
    assert not torch.equal(state["predictor.prototypes"], alone["prototypes"])


def unfinished(folder: Path) -> None:
    tree = tiny_tree(folder, name="supervised")
    tree["train"]["iterations"] = 41
    write_trained(folder, tree)


def other_width(folder: Path) -> None:
    tree = tiny_tree(folder, name="supervised")
    tree["model"]["width"] = 32
    write_trained(folder, tree)


MISTAKES = {
    "missing": (lambda folder: None, "no such run or checkpoint"),
    "without checkpoint": (lambda folder: folder.mkdir(), "last.pt: no such"),
    "no checkpoint": (lambda folder: folder.write_text("no"), "damaged, or not a checkpoint"),
    "unfinished": (unfinished, "is at iteration 40 of 41"),
    "other method": (
        lambda folder: write_trained(folder, tiny_tree(folder, name="mean_teacher")),
        "trained by method mean_teacher; prototypes come from one of method supervised",
    ),
    "other classes": (
        lambda folder: write_trained(folder, tiny_tree(folder, name="supervised"), classes=("a", "b")),
        "trained on other classes (a, b)",
    ),
    "other width": (other_width, "its network has model.width 32, this run's has 16"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_network_that_does_not_fit_is_one_line_and_nothing_is_written(tmp_path: Path, mistake: str) -> None:
    make, message = MISTAKES[mistake]
    make(tmp_path / "source")
    with pytest.raises(InputError) as caught:
        made(pcr_tree(tmp_path, tmp_path / "source"))
    text = str(caught.value)
    assert text.startswith(f"method.prototypes_from: {tmp_path / 'source'}")
    assert message in text
    assert "\n" not in text
    assert not (tmp_path / "run").exists()


def test_labels_of_other_images_are_refused(trained: Path, tmp_path: Path) -> None:
    own, theirs = tmp_path / "own.txt", tmp_path / "theirs.txt"
    own.write_text("a\nb\n")
    theirs.write_text("a\nb\nc\n")
    real = {"kind": "voc", "root": "x", "val": "x", "unlabeled": "x"}
    configs = []
    for labeled in (own, theirs):
        tree = pcr_tree(tmp_path, trained)
        tree["data"] |= real | {"labeled": str(labeled)}
        configs.append(parse_config(tree, "tiny"))
    assert initial_prototypes._other_labels(configs[1], configs[0])
    theirs.write_text("b\na\n")  # the same in another order
    assert not initial_prototypes._other_labels(configs[1], configs[0])
    theirs.unlink()  # they cannot be compared any more
    assert not initial_prototypes._other_labels(configs[1], configs[0])


def test_the_path_is_that_of_a_run_relative_to_the_working_directory(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse_config(pcr_tree(tmp_path, Path("supervised")), "tiny")
    assert dump_config(config)["method"]["prototypes_from"] == str(trained)
    file = tmp_path / "folder/run.yaml"
    file.parent.mkdir()
    file.write_text(f"output: {tmp_path / 'out'}\ndata: {{kind: synthetic}}\n")
    method = "method={name: pcr, warmup: 0, prototypes_from: nowhere}"
    monkeypatch.setattr("sys.argv", ["prcl", "train", str(file), method, "train.device=cpu"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "method.prototypes_from: nowhere: no such run or checkpoint" in capsys.readouterr().err


def test_features_between_the_networks_pixels_are_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Algorithm 2, step 2: "perform interpolation on the feature representation to match the input image"."""
    maps = draw(1, 5, 4, 6)

    class Fixed(torch.nn.Module):
        def forward(self, x: Tensor, *, representations: bool) -> Any:
            return maps

    monkeypatch.setattr(initial_prototypes, "prototype_features", lambda output, predictor: output)
    rows, columns = np.indices((13, 21)).reshape(2, -1)
    drawn = initial_prototypes.DrawnPixels(0 * rows, rows, columns, 0 * rows, None)
    image = np.zeros((13, 21, 3), np.uint8)
    config = parse_config(tiny_tree(Path("unused"), name="supervised"), "tiny")
    method: Any = torch.nn.Module()
    method.predictor = None
    found = initial_prototypes._features_at(Fixed(), method, image, drawn, rows >= 0, config, CPU)
    expected = F.interpolate(maps.double(), (13, 21), mode="bilinear", align_corners=True)[0].flatten(1).T
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_prototypes_that_cannot_be_made_leave_no_run_behind(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def label(name: str) -> np.ndarray:
        raise InputError(f"{name}: cannot be read")

    monkeypatch.setattr(initial_prototypes, "draw_pixels", lambda *_: label("labeled_0000"))
    with pytest.raises(InputError, match="cannot be read"):
        made(pcr_tree(tmp_path, trained))
    assert not (tmp_path / "run").exists()
