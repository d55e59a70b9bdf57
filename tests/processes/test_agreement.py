"""Agreement of the ranks: the first difference, and runs that differ in settings, data or files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from rich.console import Console

from prcl_fast.config import PROCESS_KEYS, SyntheticConfig, flat_config, load_config, parse_config
from prcl_fast.data.sources.synthetic import write_synthetic
from prcl_fast.engine.progress import newest_state
from prcl_fast.engine.rank_facts import check_same_weights
from prcl_fast.engine.trainer import Trainer
from prcl_fast.files.reading import file_digest
from prcl_fast.processes.agreement import DifferenceError, check_same, first_difference
from support.processes import Pair
from support.stub_networks import small_backbones
from support.tiny import tiny_tree

_REST = "; it must be the same in all processes of a run"


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ([{"seed": 0, "lr": 0.1}, {"lr": 0.1, "seed": 0}], ""),
        ([{"seed": 0, "lr": 0.1}, {"seed": 1, "lr": 0.2}], "process 1 has seed 1, process 0 has 0"),
        ([{"a": [1, 2]}, {"a": [1, 2]}, {"a": [2]}], "process 2 has a [2], process 0 has [1, 2]"),
        ([{"a": None}, {"a": True}], "process 1 has a true, process 0 has null"),
        ([{"a": 1}, {}], "process 1 has no a, process 0 has 1"),
        ([{}, {"a": ""}], "process 1 has a '', process 0 has none"),
        ([{"old": 1, "name": "x"}, {"name": "y"}], "process 1 has name y, process 0 has x"),
        ([{"a": "\x1b[31m"}, {"a": "b"}], r"process 1 has a b, process 0 has \x1b[31m"),
    ],
)
def test_the_first_difference_is_told_with_both_values(facts: list[dict[str, Any]], message: str) -> None:
    assert first_difference(facts) == (message and message + _REST)


def test_long_values_are_shown_around_their_difference() -> None:
    names = [f"class{i}" for i in range(99)]
    other = [*names[:70], "other", *names[71:]]
    message = first_difference([{"classes": ", ".join(names)}, {"classes": ", ".join(other)}])
    assert "class70" in message
    assert "other" in message
    assert "class50," not in message
    assert len(message) < 400


def test_every_key_of_a_process_exists() -> None:
    config = parse_config(tiny_tree(Path("run")), "tiny")
    pcr = parse_config(tiny_tree(Path("run")) | {"method": {"name": "pcr", "warmup": 1}}, "tiny")
    assert set(PROCESS_KEYS) <= flat_config(config).keys() | flat_config(pcr).keys()
    assert {"seed", "data.crop", "data.label_map", "train.graph"} <= flat_config(config, PROCESS_KEYS).keys()
    assert "train.threads" not in flat_config(config, PROCESS_KEYS)


def _same(rank: int, facts: list[dict[str, Any]]) -> str:
    try:
        check_same(facts[rank])
    except DifferenceError as error:
        return str(error)
    return ""


def test_both_ranks_raise_the_same_difference(two: Pair) -> None:
    assert two(_same, [{"seed": 0, "x": "é"}, {"x": "é", "seed": 0}]) == ["", ""]
    assert (
        two(_same, [{"seed": 0}, {"seed": 1, "x": "é"}])
        == [f"process 1 has seed 1, process 0 has 0{_REST}"] * 2
    )


def _trainer(rank: int, files: list[str], overrides: list[list[str]]) -> str:
    try:
        with small_backbones():
            Trainer(
                load_config(Path(files[rank]), overrides[rank]),
                Console(quiet=True),
                device=torch.device("cpu"),
            )
    except DifferenceError as error:
        return str(error)
    return ""


def _reverse(folder: Path) -> None:
    file = folder / "splits" / "labeled.txt"
    file.write_text("\n".join(reversed(file.read_text().split())) + "\n")


def _swap(folder: Path) -> None:
    first, second = sorted((folder / "SegmentationClass").iterdir())[:2]
    first.rename(folder / "former")
    second.rename(first)
    (folder / "former").rename(second)


def _nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "overrides", "named"),
    [
        (_nothing, ["data.workers=1", "train.threads=1"], ""),
        (_nothing, ["seed=1"], "seed 1, process 0 has 0"),
        (_nothing, ["method.name=supervised"], "method.name supervised, process 0 has prcl"),
        (_nothing, ["train.graph=true"], "train.graph true, process 0 has false"),
        (_nothing, ["train.save_every=7"], "train.save_every 7"),
        (_nothing, ["data.label_map={1: 2}"], "data.label_map"),
        (
            _nothing,
            ["data.classes=[a, b, c, d, e, f]"],
            "data.classes a, b, c, d, e, f, process 0 has background",
        ),
        (_reverse, [], "data.labeled 2 images, list "),
        (_swap, [], "files of data.labeled content "),
    ],
)
def test_a_trainer_refuses_ranks_with_other_settings_data_or_weights(
    change: Callable[[Path], None], overrides: list[str], named: str, two: Pair, tmp_path: Path
) -> None:
    write_synthetic(tmp_path / "data", SyntheticConfig(labeled=2, unlabeled=2, val=1))
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    change(tmp_path / "copy")
    files = [str(tmp_path / name / "config.yaml") for name in ("data", "copy")]
    own = [
        f"output={tmp_path / 'run'}",
        "train.device=cpu",
        "train.batch_labeled=2",
        "train.batch_unlabeled=4",
        "data.workers=0",
    ]
    found = two(_trainer, files, [own, [*own, *overrides]])
    if named:
        assert found[0] == found[1]
        assert found[0].startswith(f"process 1 has {named}")
        assert not (tmp_path / "run").exists()
    else:
        assert found == ["", ""]


def _start(rank: int, folder: str, weights: list[str]) -> str:
    config = parse_config(
        tiny_tree(Path(folder)) | {"model": {"weights": f"{folder}/{weights[rank]}"}}, "tiny"
    )
    try:
        check_same_weights(config, None)
    except DifferenceError as error:
        return str(error)
    return ""


def test_weights_files_of_other_content_are_refused(two: Pair, tmp_path: Path) -> None:
    for name, content in (("a.pth", b"x"), ("copy_of_a.pth", b"x"), ("b.pth", b"y")):
        (tmp_path / name).write_bytes(content)
    assert two(_start, str(tmp_path), ["a.pth", "copy_of_a.pth"]) == ["", ""]
    found = two(_start, str(tmp_path), ["a.pth", "b.pth"])
    assert found[0] == found[1]
    assert found[0].startswith("process 1 has model.weights content ")


def _resumed(rank: int, folders: list[str]) -> str:
    try:
        newest_state(Path(folders[rank]), lambda _: None)
    except DifferenceError as error:
        return str(error)
    return ""


def test_checkpoints_of_other_content_are_refused(two: Pair, tmp_path: Path) -> None:
    with small_backbones():
        for name in ("one", "other"):
            config = parse_config(tiny_tree(tmp_path / name), "tiny")
            trainer = Trainer(config, Console(quiet=True))
            trainer.iteration = len(name)
            trainer._save("last.pt", MagicMock())
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    assert two(_resumed, [one, one]) == ["", ""]
    found = two(_resumed, [one, other])
    assert found[0] == found[1]
    assert found[0].startswith("process 1 has output last.pt content ")


def test_the_digest_of_a_file_depends_on_its_content_alone(tmp_path: Path) -> None:
    for name, content in (("a", b"x" * 3_000_000), ("b", b"x" * 3_000_000), ("c", b"y")):
        (tmp_path / name).write_bytes(content)
    first, second, third = (file_digest(tmp_path / name, "file") for name in "abc")
    assert first == second != third
