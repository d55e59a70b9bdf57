"""Mistakes in the input: one line that names the file, key or argument, exit status 2, nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

from prcl_fast.config import SyntheticConfig, load_config, parse_config
from prcl_fast.data.sources.synthetic import write_synthetic
from prcl_fast.engine.trainer import Trainer
from prcl_fast.errors import InputError
from support.commands import prcl
from support.tiny import tiny_tree


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set on disk, in VOC's layout, with a configuration of a very short run."""
    folder = tmp_path_factory.mktemp("set") / "data"
    write_synthetic(folder, SyntheticConfig(size=[64, 64], labeled=3, unlabeled=4, val=2))
    tree = tiny_tree(folder / "run") | {"data": yaml.safe_load((folder / "config.yaml").read_text())["data"]}
    tree["data"] |= {"workers": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture
def data(tmp_path: Path, data_set: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to spoil, as the working directory; the output is data/out."""
    shutil.copytree(data_set, tmp_path / "data")
    monkeypatch.chdir(tmp_path / "data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "data"


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs `prcl ARGUMENTS`, which must end with status 2; returns its one line."""
    status = prcl(*arguments)
    said = capsys.readouterr()
    assert status == 2, said.err
    assert said.out == ""
    line = said.err.strip().splitlines()[-1]
    assert line.startswith("prcl: ")
    assert "Traceback" not in said.err
    return line


def first(path: Path) -> str:
    return path.read_text().splitlines()[0]


def _mask(data: Path, change: Callable[[np.ndarray], np.ndarray], mode: str = "L") -> None:
    path = data / "SegmentationClass" / f"{first(data / 'splits/labeled.txt')}.png"
    label = change(np.array(Image.open(path)))
    Image.fromarray(label.astype(np.uint8), mode=mode).save(path)


def unlabeled_twice(data: Path) -> None:
    with (data / "splits/unlabeled.txt").open("a") as file:
        file.write(first(data / "splits/labeled.txt") + "\n")


def truncated(data: Path) -> None:
    for name in (data / "splits/labeled.txt").read_text().split():
        path = data / "JPEGImages" / f"{name}.jpg"
        path.write_bytes(path.read_bytes()[:600])


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing split": (lambda d: (d / "splits/val.txt").unlink(), "val.txt"),
    "empty split": (lambda d: (d / "splits/labeled.txt").write_text("\n\n"), "labeled.txt"),
    "overlapping splits": (unlabeled_twice, "labeled_0000"),
    "parent in a split line": (
        lambda d: (d / "splits/unlabeled.txt").write_text("../../etc/passwd\n"),
        "unlabeled.txt",
    ),
    "image missing": (
        lambda d: (d / "JPEGImages" / f"{first(d / 'splits/val.txt')}.jpg").unlink(),
        "val_0000",
    ),
    "image without label": (
        lambda d: (d / "SegmentationClass" / f"{first(d / 'splits/labeled.txt')}.png").unlink(),
        "labeled_0000",
    ),
    "id out of range": (lambda d: _mask(d, lambda label: label + 77), "labeled_0000.png"),
    "RGB mask": (lambda d: _mask(d, lambda label: np.stack([label] * 3, -1), "RGB"), "labeled_0000.png"),
    "size mismatch": (lambda d: _mask(d, lambda label: label[:-3]), "labeled_0000.png"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_data_set_is_named_before_anything_is_written(
    data: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    spoil, name = SPOILT[case]
    spoil(data)
    assert name in fails(capsys, "train", "config.yaml", "output=out")
    assert not (data / "out").exists()


def test_a_truncated_image_is_named_when_it_is_read(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncated(data)
    assert "labeled_000" in fails(capsys, "train", "config.yaml", "output=out")
    assert "labeled_000" in fails(capsys, "train", "config.yaml", "output=out2", "data.workers=1")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.tua=1"], "unknown key method.tua; did you mean tau?"),
        (["method.tau=warm"], "method.tau: input should be a valid number"),
        (["method.delta_w=2"], "method.delta_w: input should be less than or equal to 1"),
        (["data.crop=[8, 8]"], "data.crop: [8, 8] is smaller than model.output_stride 16"),
        (["data.classes=[one]"], "data.classes: at least 2 are needed, got 1"),
        (["output=config.yaml/run"], "output: config.yaml/run cannot be written"),
        (["data.root=nowhere"], "nowhere"),
        (["model.weights=nowhere.pth"], "nowhere.pth"),
        (["model.weights=config.yaml"], "config.yaml"),
        (["train.device=cuda:99"], "device: cuda:99"),
        (["train.device=tpu"], "device: 'tpu'"),
        (["train.batch_unlabeled=1"], "train.batch_unlabeled"),
        (["data.classes=nowhere.txt"], "data.classes: nowhere.txt: no such file of class names"),
        (["data.val=nowhere.txt"], "data.val: nowhere.txt: no such split file"),
        (["data.labeled=nowhere.txt"], "data.labeled: nowhere.txt: no such split file"),
        (["model.weights=nowhere"], "model.weights: nowhere: no such weights file"),
        (["model.weights=splits"], "model.weights: splits: no best.pt or last.pt in this folder"),
        (["method.anchors=1000000000"], "method.anchors: input should be less than or equal to 65536"),
        (["method.negatives=1000000000000"], "method.negatives: input should be less than or equal to 65536"),
        (
            ["method.anchors=65536", "method.negatives=65536"],
            "classes * method.anchors / method.anchors_per_set * method.negatives must be below 2^32",
        ),
        (["model.dim=10000000"], "model.dim: input should be less than or equal to 4096"),
        (["model.width=1000000"], "model.width: input should be less than or equal to 4096"),
        (["model.base_width=1000000"], "model.base_width: input should be less than or equal to 256"),
        (["data.crop=[1000000, 1000000]"], "data.crop.0: input should be less than or equal to 16384"),
        (["data.crop=[16384, 16384]", "train.batch_labeled=8"], "data.crop: 10 crops of [16384, 16384]"),
        (
            ["train.batch_labeled=1000000000"],
            "train.batch_labeled: input should be less than or equal to 4096",
        ),
        (["eval.batch=1000000000"], "eval.batch: input should be less than or equal to 4096"),
        (["eval.scales=[300]"], "eval.scales.0: input should be less than or equal to 16"),
        (["eval.window=[1000000, 64]"], "eval.window.0: input should be less than or equal to 16384"),
        (
            ["data.synthetic.val=1000000000"],
            "data.synthetic.val: input should be less than or equal to 100000",
        ),
    ],
)
def test_a_wrong_value_is_named_before_anything_is_written(
    data: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    before = sorted(path.name for path in data.iterdir())
    output = [] if overrides[0].startswith("output") else ["output=out"]
    assert message in fails(capsys, "train", "config.yaml", *output, *overrides)
    assert sorted(path.name for path in data.iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "nowhere.yaml"],
        ["eval", "nowhere"],
        ["predict", "nowhere", "JPEGImages", "--out", "out"],
        ["figures", "nowhere"],
        ["data", "check", "nowhere.yaml"],
        ["weights", "nowhere", "--out", "out.pt"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_a_missing_file_is_named_by_every_command(
    data: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert "nowhere" in fails(capsys, *arguments)
    assert not (data / "out").exists()


def test_a_spoilt_or_foreign_checkpoint_is_named_and_left_alone(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["output=run", "method.name=supervised", "train.iterations=1"]
    Trainer(load_config(data / "config.yaml", overrides), Console(quiet=True)).run()
    last = data / "run" / "last.pt"
    whole = last.read_bytes()
    with (data / "fewer.txt").open("w") as file:
        file.write("background\nthing\n")

    line = fails(capsys, "train", "config.yaml", *overrides[:2], "train.iterations=2")
    assert "output: run holds another configuration's run" in line
    line = fails(capsys, "eval", "run", f"data.classes={data / 'fewer.txt'}", "data.palette=null")
    assert "class" in line
    assert last.read_bytes() == whole

    for name in ("last.pt", "best.pt"):
        (data / "run" / name).write_bytes(whole[: len(whole) // 2])
    for arguments in (
        ["train", "config.yaml", *overrides],
        ["eval", "run"],
        ["predict", "run", "JPEGImages", "--out", "out"],
    ):
        assert ".pt: damaged" in fails(capsys, *arguments)
    assert last.read_bytes() == whole[: len(whole) // 2]
    assert not (data / "out").exists()


def test_a_cache_without_a_place_leaves_no_output(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path / "run")
    tree["data"] |= {"cache": "disk", "cache_dir": "/proc/none"}
    with pytest.raises(InputError, match=r"data\.cache: /proc/none/.*: cannot be written: "):
        Trainer(parse_config(tree, "tiny"), Console(quiet=True))
    assert not (tmp_path / "run").exists()
