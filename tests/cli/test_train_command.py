"""`prcl train`: a run that exists is extended or refused, and its log holds what the user has read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from prcl_fast.config import SyntheticConfig
from prcl_fast.data.sources.synthetic import write_synthetic
from support.commands import prcl
from support.stub_networks import small_backbones
from support.tiny import tiny_tree


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, run.yaml and its finished run."""
    folder = tmp_path_factory.mktemp("train")
    write_synthetic(folder / "data", SyntheticConfig(size=[64, 64], labeled=3, unlabeled=4, val=2))
    tree = tiny_tree(Path("out"), name="supervised")
    tree["data"] = yaml.safe_load((folder / "data" / "config.yaml").read_text())["data"]
    tree["data"] |= {"workers": 0, "root": "data"}
    tree["data"] |= {key: f"data/splits/{key}.txt" for key in ("labeled", "unlabeled", "val")}
    tree["train"] |= {"iterations": 2, "log_every": 1}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert prcl("train", "run.yaml") == 0
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the working directory."""
    shutil.copytree(trained, tmp_path / "copy")
    text = (tmp_path / "copy/out/config.yaml").read_text()
    (tmp_path / "copy/out/config.yaml").write_text(text.replace(str(trained), str(tmp_path / "copy")))
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(autouse=True, scope="module")
def _small_networks() -> Iterator[None]:
    with small_backbones():
        yield


def test_the_log_holds_the_lines_of_standard_error_and_the_command(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prcl("train", "run.yaml", "train.iterations=4", "--extend") == 0
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["iterations"] == 4
    entries = [line.partition(" ")[2] for line in (folder / "out/log.txt").read_text().splitlines()]
    start = entries.index("info: command: prcl train run.yaml train.iterations=4 --extend")
    lines = [line for line in said.err.splitlines() if line]
    assert entries[start + 1 :] == [f"info: {line}" for line in lines]
    assert "extended from 2 to 4 iterations; the schedules go on as those of 4" in lines


def test_a_refusal_is_one_line_and_leaves_the_log_of_the_run_as_it_is(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = folder / "out/log.txt"
    before = log.read_text()
    for more in (["train.iterations=3"], ["train.iterations=1", "--extend"], ["--extend"], ["optim.lr=0.5"]):
        assert prcl("train", "run.yaml", *more) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(("prcl: output: out holds another configuration's run: ", "prcl: --extend: "))

    (folder / "data/splits/val.txt").write_text("val_0000\n")
    assert prcl("train", "run.yaml") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "data.val: 2 images" in line
    assert log.read_text() == before

    assert prcl("train", "run.yaml", "--accept-data") == 0
    assert "note: the data has changed since out/last.pt was written: data.val: 2" in capsys.readouterr().err
