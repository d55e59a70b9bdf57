"""`model.weights`: a backbone, a network file, a checkpoint or the folder of another run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from prcl_fast.cli.main import app
from prcl_fast.config import load_config, parse_config
from prcl_fast.engine.initial_weights import load_initial_weights
from prcl_fast.engine.trainer import Trainer
from prcl_fast.errors import InputError
from prcl_fast.methods import Method, build_method
from prcl_fast.models.network import SegmentationNetwork
from prcl_fast.models.weights import save_network
from prcl_fast.runs.checkpoint import load_checkpoint, load_run, save_checkpoint
from support.run_folders import write_run
from support.stub_networks import small_backbones
from support.tiny import tiny_tree

CPU = torch.device("cpu")
CLASSES = ("background", "disc", "square", "triangle", "ring", "cross")


@pytest.fixture(autouse=True)
def _small_backbones() -> Iterator[None]:
    with small_backbones():
        yield


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """The folder of a PRCL run whose teacher differs from its student."""
    folder = tmp_path / "parent"
    write_run(folder, tiny_tree(folder), CLASSES)
    state = load_checkpoint(folder / "best.pt")
    for key, value in state["method"].items():
        if key.startswith("teacher.") and value.is_floating_point():
            value += 1.0
    save_checkpoint(folder / "best.pt", state)
    return folder


def begun(
    tree: dict[str, Any], weights: Path, classes: tuple[str, ...] = CLASSES
) -> tuple[Method, list[str]]:
    """A new method with these initial weights, and the lines about them."""
    tree["model"]["weights"] = str(weights)
    config = parse_config(tree, "test")
    torch.manual_seed(9)
    method = build_method(config, len(classes))
    lines: list[str] = []
    load_initial_weights(method, config, classes, lines.append)
    return method, lines


def networks_of(method: Method) -> list[SegmentationNetwork]:
    return [module for module in method.modules() if isinstance(module, SegmentationNetwork)]


def teacher_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_run(folder, CPU).networks["teacher"].state_dict()


def loaded_parts(network: SegmentationNetwork, source: dict[str, torch.Tensor]) -> set[str]:
    """The parts of a network that are bitwise those of `source`."""
    own = network.state_dict()
    parts = {key.partition(".")[0] for key in own}
    return {
        part
        for part in parts
        if all(
            key in source and torch.equal(value, source[key])
            for key, value in own.items()
            if key.startswith(f"{part}.")
        )
    }


WHOLE = {"backbone", "decoder", "classifier", "representation", "probability"}


@pytest.mark.parametrize("name", ["", "best.pt"])
def test_a_run_gives_the_weights_of_its_evaluated_network(parent: Path, tmp_path: Path, name: str) -> None:
    method, lines = begun(tiny_tree(tmp_path / "run"), parent / name)
    for network in networks_of(method):
        assert loaded_parts(network, teacher_of(parent)) == WHOLE
    assert len(networks_of(method)) == 2
    assert lines == [
        f"model.weights: {parent / 'best.pt'}: the teacher of iteration 40, with its heads",
    ]


def test_without_best_the_newest_last_checkpoint_is_taken(parent: Path, tmp_path: Path) -> None:
    (parent / "best.pt").rename(parent / "last-1.pt")
    _, lines = begun(tiny_tree(tmp_path / "run"), parent)
    assert str(parent / "last-1.pt") in lines[0]


def test_for_other_classes_the_classifier_starts_anew(parent: Path, tmp_path: Path) -> None:
    method, lines = begun(tiny_tree(tmp_path / "run"), parent, ("a", "b", "c"))
    for network in networks_of(method):
        assert loaded_parts(network, teacher_of(parent)) == WHOLE - {"classifier"}
    best = parent / "best.pt"
    assert lines == [f"model.weights: {best}: 6 classes there, 3 here: the classifier starts anew"]
    renamed = ("background", "disc", "triangle", "square", "ring", "cross")
    method, lines = begun(tiny_tree(tmp_path / "run"), parent, renamed)
    assert loaded_parts(method.student, teacher_of(parent)) == WHOLE - {"classifier"}
    assert lines == [
        f"model.weights: {best}: class 2 is 'square' there, 'triangle' here: the classifier starts anew"
    ]


def test_heads_of_other_shapes_start_anew(parent: Path, tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path / "run")
    tree["model"]["dim"] = 12
    method, lines = begun(tree, parent)
    assert loaded_parts(method.student, teacher_of(parent)) == {"backbone", "decoder", "classifier"}
    assert lines[0].endswith("no representation and probability of these shapes there: they start anew")
    pps = tiny_tree(tmp_path / "pps", name="pps", prototypes=2, layers=1, heads=2, anchors=4, negatives=4)
    method, lines = begun(pps, parent)
    first, second = networks_of(method)
    assert loaded_parts(first, teacher_of(parent)) == {"backbone", "decoder"}
    assert loaded_parts(second, teacher_of(parent)) == {"backbone"}
    assert "best.pt: a classifier of another kind: the classifier starts anew; the second" in lines[0]


def test_networks_that_supervise_each_other_do_not_become_equal(parent: Path, tmp_path: Path) -> None:
    method, lines = begun(tiny_tree(tmp_path / "run", name="cps"), parent)
    first, second = networks_of(method)
    assert loaded_parts(first, teacher_of(parent)) == {"backbone", "decoder", "classifier"}
    assert loaded_parts(second, teacher_of(parent)) == {"backbone"}
    assert lines[0].endswith(
        ", with its heads; the second network takes the backbone alone, to differ from the first"
    )


def test_the_movement_of_sigma2_counts_from_the_random_head(parent: Path, tmp_path: Path) -> None:
    """A trained head that stays as it is has learned before; its file may change until the run resumes."""
    trainers = []
    for name, weights in (("random", None), ("trained", str(parent))):
        tree = tiny_tree(tmp_path / name)
        tree["model"]["weights"] = weights
        trainers.append(Trainer(parse_config(tree, "tiny"), Console(quiet=True)))
    random, trained = (trainer._head for trainer in trainers)
    assert random is not None
    assert trained is not None
    heads = [head._start.state_dict() for head in (random, trained)]
    assert all(torch.equal(value, heads[1][key]) for key, value in heads[0].items())
    assert loaded_parts(trainers[1].method.student, teacher_of(parent)) == WHOLE


def test_another_architecture_is_refused_with_all_keys(parent: Path, tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path / "run")
    tree["model"] |= {"backbone": "resnet34", "width": 32}
    with pytest.raises(InputError) as caught:
        begun(tree, parent)
    assert str(caught.value) == (
        f"model.weights: {parent / 'best.pt'}: its network has model.backbone resnet18, model.width 16, this "
        "run's has resnet34, 32"
    )


def test_a_network_file_may_have_other_classes(parent: Path, tmp_path: Path) -> None:
    file = tmp_path / "network.pth"
    network = networks_of(begun(tiny_tree(tmp_path / "run"), parent)[0])[0]
    save_network(network.state_dict(), 6, file)
    method, lines = begun(tiny_tree(tmp_path / "run"), file)
    assert loaded_parts(method.student, network.state_dict()) == WHOLE
    assert lines == [f"model.weights: {file}: a network file, with its heads"]
    method, lines = begun(tiny_tree(tmp_path / "run"), file, ("a", "b"))
    assert loaded_parts(method.student, network.state_dict()) == WHOLE - {"classifier"}
    assert lines == [f"model.weights: {file}: 6 classes there, 2 here: the classifier starts anew"]
    tree = tiny_tree(tmp_path / "run")
    tree["model"]["width"] = 32
    with pytest.raises(InputError, match=r"^model\.weights: .*network\.pth: does not fit backbone and"):
        begun(tree, file)


def test_a_run_is_exported_as_a_network_file(parent: Path, tmp_path: Path) -> None:
    out = tmp_path / "network.pth"
    done = CliRunner().invoke(app, ["weights", str(parent), "--out", str(out)])
    assert done.exit_code == 0, done.output
    source = teacher_of(parent)
    method, lines = begun(tiny_tree(tmp_path / "run"), out)
    assert loaded_parts(method.student, source) == WHOLE
    _, lines = begun(tiny_tree(tmp_path / "run"), out, (*CLASSES[:5], "tree"))
    assert lines[0].endswith("class 5 is 'cross' there, 'tree' here: the classifier starts anew")


def test_a_folder_is_relative_to_the_configuration_file(parent: Path, tmp_path: Path) -> None:
    file = tmp_path / "configs" / "c.yaml"
    file.parent.mkdir()
    file.write_text(
        "output: o\ndata: {kind: synthetic}\nmethod: {name: supervised}\nmodel: {weights: ../parent}\n"
    )
    weights = load_config(file).model.weights
    assert weights is not None
    assert weights.resolve() == parent


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "best.pt").unlink(), r"no best\.pt or last\.pt in this folder"),
        (
            lambda folder: (folder / "best.pt").write_bytes(b"<html>"),
            r"best\.pt: damaged, or not a checkpoint",
        ),
        (lambda folder: shutil.rmtree(folder), "no such weights file"),
    ],
)
def test_a_run_that_cannot_be_read_is_one_line_and_nothing_is_written(
    parent: Path, tmp_path: Path, spoil: Any, message: str
) -> None:
    spoil(parent)
    tree = tiny_tree(tmp_path / "run")
    tree["model"]["weights"] = str(parent)
    with pytest.raises(InputError, match=rf"^model\.weights: .*{message}"):
        Trainer(parse_config(tree, "tiny"), Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_has_its_own_weights(parent: Path, tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path / "run", name="supervised")
    tree["model"]["weights"] = str(parent)
    Trainer(parse_config(tree, "tiny"), Console(quiet=True)).run()
    own = load_checkpoint(tmp_path / "run/last.pt")["method"]
    shutil.copytree(parent, tmp_path / "kept")
    shutil.rmtree(parent)  # no longer needed
    again = Trainer(parse_config(tree, "tiny"), Console(quiet=True)).method.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in again.items())
    former = teacher_of(tmp_path / "kept")["classifier.0.weight"]
    assert not torch.equal(own["student.classifier.0.weight"], former)
