"""Bundled configurations: found by name where they do not lie, listed and copied by `prcl configs`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prcl_fast.cli.main import app, main
from prcl_fast.config import load_config
from prcl_fast.config.bundled import bundled_folder, find_config
from prcl_fast.errors import InputError
from prcl_fast.sweep.config import read_sweep
from support.paths import CONFIGS

MISSING = "no such configuration file; prcl configs lists the bundled ones"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without configurations."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_clone_bundles_its_own_configs() -> None:
    assert bundled_folder() == CONFIGS


def test_an_installed_package_bundles_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prcl_fast" / "configs").mkdir(parents=True)
    monkeypatch.setattr("prcl_fast.config.bundled._PACKAGE", tmp_path / "prcl_fast")
    assert bundled_folder() == tmp_path / "prcl_fast" / "configs"


def test_a_bundled_file_is_read_as_if_it_lay_here_and_one_line_says_so(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(Path("configs/voc/prcl.yaml"))
    assert lines(capsys) == [
        f"prcl: configs/voc/prcl.yaml: no such file here; reading the bundled {CONFIGS}/voc/prcl.yaml"
    ]
    assert config.data.root == Path("data/voc")  # of base.yaml, which stands beside it
    assert config.output == Path("runs/voc_prcl")
    (elsewhere / "data/voc").mkdir(parents=True)
    assert config.data.root.is_dir()


def test_a_file_that_is_here_is_the_one_read(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = elsewhere / "configs" / "voc"
    here.mkdir(parents=True)
    (here / "base.yaml").write_text("output: mine\ndata: {kind: synthetic}\nmethod: {name: supervised}\n")
    assert load_config(Path("configs/voc/base.yaml")).output == Path("mine")
    assert lines(capsys) == []


@pytest.mark.parametrize("folder", [".", "experiments", "/"], ids=["here", "below", "absolute"])
def test_a_configuration_inherits_from_a_bundled_one(
    folder: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = elsewhere / "other" if folder == "/" else Path(folder)
    place.mkdir(exist_ok=True)
    (place / "mine.yaml").write_text("base: configs/voc/prcl.yaml\ndata: {root: images}\n")
    config = load_config(place / "mine.yaml")
    assert config.data.root == place / "images"
    # As in a clone with this file beside configs/.
    assert config.data.val == place / "data/splits/pascal/val.txt"
    assert [line.split(": ")[1] for line in lines(capsys)] == [str(place / "configs/voc/prcl.yaml")]


def test_a_sweep_takes_bundled_configurations(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (elsewhere / "below").mkdir()
    text = (
        "output: runs\nconfig: configs/demo.yaml\naxes: {method: {prcl: {}, mine: {set: {optim.lr: 0.1}}}}\n"
    )
    (elsewhere / "below" / "sweep.yaml").write_text(text)
    assert len(read_sweep(Path("below/sweep.yaml")).runs) == 2
    assert [line.split(": ")[1] for line in lines(capsys)] == ["below/configs/demo.yaml"]


def test_a_wrong_folder_is_not_replaced(elsewhere: Path) -> None:
    with pytest.raises(InputError, match=f"^experiment/configs/demo.yaml: {MISSING}$"):
        load_config(Path("experiment/configs/demo.yaml"))


def test_a_bundled_sweep_reads_the_bundled_files_that_it_names(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = read_sweep(Path("configs/sweeps/ijcv_table_1.yaml"))
    assert [line.split(": ")[1] for line in lines(capsys)] == ["configs/sweeps/ijcv_table_1.yaml"]
    assert sweep.runs[0].config.data.labeled == Path("data/splits/pascal/92/labeled.txt")
    assert len(sweep.runs) == len(read_sweep(CONFIGS / "sweeps/ijcv_table_1.yaml").runs)


@pytest.mark.parametrize(
    "name",
    ["configs/voc/nothing.yaml", "configs", "demo.yaml", "../configs/demo.yaml", "configs/../demo.yaml"],
)
def test_a_file_that_exists_nowhere_is_named(name: str, elsewhere: Path) -> None:
    with pytest.raises(InputError, match=f"^{name}: {MISSING}$"):
        find_config(Path(name), Path(name))


def test_a_link_to_nothing_is_not_replaced(elsewhere: Path) -> None:
    (elsewhere / "configs").mkdir()
    (elsewhere / "configs" / "demo.yaml").symlink_to("nowhere.yaml")
    with pytest.raises(InputError, match=r"^configs/demo\.yaml: no such configuration file$"):
        load_config(Path("configs/demo.yaml"))


def test_prcl_train_trains_a_bundled_file(elsewhere: Path) -> None:
    small = ["data.synthetic.unlabeled=4", "data.synthetic.val=2", "model.base_width=8", "model.width=16"]
    result = CliRunner().invoke(
        app, ["train", "configs/demo.yaml", "output=run", "train.iterations=2", *small]
    )
    assert result.exit_code == 0, result.output
    said = [line for line in result.output.splitlines() if "bundled" in line]
    assert said == [f"prcl: configs/demo.yaml: no such file here; reading the bundled {CONFIGS}/demo.yaml"]
    assert json.loads(result.output.splitlines()[-1])["iterations"] == 2
    assert (elsewhere / "run" / "last.pt").is_file()


def test_prcl_configs_lists_every_file_by_the_name_to_give(elsewhere: Path) -> None:
    result = CliRunner().invoke(app, ["configs"])
    assert result.exit_code == 0
    listed = {word for word in result.stdout.split() if word.startswith("configs/")}
    assert listed == {f"configs/{path.relative_to(CONFIGS)}" for path in CONFIGS.rglob("*.yaml")}
    assert "PRCL on generated images, without any file" in result.stdout


def test_prcl_configs_copies_all_files(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert CliRunner().invoke(app, ["configs", "configs"]).exit_code == 0
    names = {path.relative_to(CONFIGS) for path in CONFIGS.rglob("*")}
    assert {path.relative_to(elsewhere / "configs") for path in (elsewhere / "configs").rglob("*")} == names
    assert load_config(Path("configs/voc/prcl.yaml")) is not None
    assert lines(capsys) == []  # the copies are read


def test_prcl_configs_overwrites_nothing(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "mine.yaml").write_text("output: x\n")
    monkeypatch.setattr("sys.argv", ["prcl", "configs", "."])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert lines(capsys) == ["prcl: .: exists already and is not an empty folder"]
    assert [path.name for path in elsewhere.iterdir()] == ["mine.yaml"]
