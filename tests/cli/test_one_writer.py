"""Commands and the lock of their output: a second writer is refused before it changes anything."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from prcl_fast.files.locking import LOCK, FolderLock
from support.commands import prcl
from support.tiny import tiny_tree


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.yaml and its finished run, out/."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "config.yaml").write_text(yaml.safe_dump(tiny_tree(folder / "out", name="supervised")))
    assert prcl("train", str(folder / "config.yaml")) == 0
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the working directory."""
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "copy"


@pytest.fixture
def locks() -> Iterator[list[FolderLock]]:
    """Locks that are released after the test."""
    held: list[FolderLock] = []
    yield held
    for lock in held:
        lock.release()


def content(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below `folder`, but locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.name != LOCK
    }


TRAIN = ("train", "config.yaml", "output=out")
WRITERS = {
    "train": (TRAIN, "out"),
    "figures": (("figures", "out"), "out/figures"),
    "analyse": (("analyse", "out"), "out/analysis"),
    "analyse --out": (("analyse", "out", "--out", "results"), "results"),
    "compare": (("compare", "out", "--out", "results"), "results"),
    "predict": (("predict", "out", "image.png", "--out", "results"), "results"),
    "profile": (("profile", "config.yaml", "--out", "results"), "results"),
    "data split make": (("data", "split", "make", "pool.txt", "1", "--out", "results"), "results"),
}


@pytest.mark.parametrize("command", WRITERS)
def test_a_second_writer_is_told_who_holds_the_output_and_changes_nothing(
    folder: Path, locks: list[FolderLock], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    arguments, place = WRITERS[command]
    shutil.copy(folder / "out/figures/curves.png", folder / "image.png")
    (folder / "pool.txt").write_text("a\nb\n")
    (folder / place).mkdir(exist_ok=True)
    locks.append(FolderLock(folder / place, "output"))
    before = content(folder)
    assert prcl(*arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert f"{place} is in use by process " in said[-1]
    assert content(folder) == before


def test_commands_that_only_read_a_run_are_not_blocked(folder: Path, locks: list[FolderLock]) -> None:
    locks.append(FolderLock(folder / "out", "output"))
    assert prcl("eval", "out") == 0
    assert prcl("figures", "out") == 0
    assert prcl("compare", "out") == 0


def test_a_finished_command_leaves_no_lock(folder: Path) -> None:
    assert prcl("figures", "out") == 0
    assert prcl("compare", "out", "--out", "results") == 0
    assert not list(folder.rglob(LOCK))


def test_training_ends_well_while_another_command_draws_its_figures(
    folder: Path, locks: list[FolderLock], capsys: pytest.CaptureFixture[str]
) -> None:
    locks.append(FolderLock(folder / "out/figures", "figures"))
    assert prcl(*TRAIN) == 0
    assert "figures: out/figures is in use by process " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tensorboard", "figures"])
def test_a_run_folder_with_a_link_inside_is_refused_before_anything_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    shutil.rmtree(folder / "out" / name)
    (folder / "other").mkdir()
    (folder / "out" / name).symlink_to(folder / "other")
    before = content(folder)
    assert prcl(*TRAIN) == 2
    assert capsys.readouterr().err.endswith(f"out/{name}: cannot be written: it is a link; remove it\n")
    assert content(folder) == before


@pytest.mark.parametrize(("command", "name"), [("figures", "figures"), ("analyse", "analysis")])
def test_no_command_writes_through_a_link_in_a_run_folder(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    shutil.rmtree(folder / "out" / name, ignore_errors=True)
    (folder / "other").mkdir()
    (folder / "out" / name).symlink_to(folder / "other")
    before = content(folder)
    assert prcl(command, "out") == 2
    assert capsys.readouterr().err.endswith(f"out/{name}: cannot be written: it is a link; remove it\n")
    assert content(folder) == before


def test_the_output_itself_may_be_a_link_of_the_user(folder: Path) -> None:
    (folder / "out").rename(folder / "disk")
    (folder / "out").symlink_to("disk")
    assert prcl(*TRAIN) == 0
    assert prcl("figures", "out") == 0
    assert (folder / "out").is_symlink()


def test_configurations_are_copied_whole_or_not_at_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "full").mkdir()
    (folder / "linked").symlink_to("full")

    def copy(source: str, target: str, **_: object) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copy2", copy)
        patch.setattr(shutil.copytree, "__defaults__", (False, None, copy, False, False))
        for name in ("full", "linked", "new"):
            assert prcl("configs", name) == 2
            assert f"{name}: cannot be written: " in capsys.readouterr().err
    assert not list((folder / "full").iterdir())
    assert not (folder / "new").exists()
    assert not list(folder.glob(".*"))
    assert prcl("configs", "linked") == 0
    assert (folder / "full" / "demo.yaml").is_file()
