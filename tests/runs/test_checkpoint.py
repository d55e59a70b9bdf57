"""Checkpoints: the file, its checksum, the rotation, and damaged ones."""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prcl_fast.errors import InputError
from prcl_fast.files.writing import remove_leftovers
from prcl_fast.runs import checkpoint_file
from prcl_fast.runs.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    load_run,
    newest_checkpoint,
    save_checkpoint,
    save_last,
)
from prcl_fast.runs.checkpoint_file import DamagedCheckpointError
from support.run_folders import iterations, silent, small_state, write_run
from support.tiny import tiny_tree

CPU = torch.device("cpu")


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("options", [{}, {"mmap": True}])
def test_plain_torch_load_opens_a_checkpoint(tmp_path: Path, options: dict[str, Any]) -> None:
    save_checkpoint(tmp_path / "best.pt", small_state(7))
    state = torch.load(tmp_path / "best.pt", weights_only=True, **options)
    assert state["iteration"] == 7
    assert state["method"]["weight"].tolist() == [7.0] * 8
    assert zipfile.ZipFile(tmp_path / "best.pt").testzip() is None


def test_a_changed_byte_and_a_cut_anywhere_are_found_before_anything_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, small_state(7))
    whole = path.read_bytes()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a damaged file was unpickled"))
    places = [*range(0, len(whole) - 200, 7), *range(len(whole) - 200, len(whole))]  # our part is at the end
    for place in places:
        changed = bytes([whole[place] ^ 0x10])
        for damaged in (whole[:place] + changed + whole[place + 1 :], whole[:place]):
            path.write_bytes(damaged)
            with pytest.raises(DamagedCheckpointError):
                load_checkpoint(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(DamagedCheckpointError):
        load_checkpoint(path)


def _version_1(whole: bytes) -> bytes:
    archive = io.BytesIO()
    torch.save({"format": "prcl_fast-checkpoint", "version": 1, **small_state(7)}, archive)
    return archive.getvalue()


def _foreign(whole: bytes) -> bytes:
    archive = io.BytesIO()
    torch.save({"weight": torch.zeros(3)}, archive)
    return archive.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda whole: whole[:1000] + b"!" + whole[1001:],
            r"damaged: its checksum does not match \(\d+ bytes\)",
        ),
        (lambda whole: whole[:-1], r"damaged: truncated, or overwritten at its end \(\d+ bytes\)"),
        (lambda whole: b"", r"damaged: truncated, or overwritten at its end \(0 bytes\)"),
        (lambda whole: bytes(len(whole)), r"damaged, or not a checkpoint of prcl_fast \(\d+ bytes\)"),
        (_foreign, r"damaged, or not a checkpoint of prcl_fast \(\d+ bytes\)"),
        (_version_1, "made by an older version of prcl_fast, which this one cannot read"),
    ],
    ids=["changed", "cut off", "empty", "zeros", "foreign", "version 1"],
)
def test_the_fault_of_a_file_is_one_line(
    tmp_path: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, small_state(7))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=rf"last\.pt: {message}$"):
        load_checkpoint(path)


def test_a_newer_format_and_a_state_without_a_key_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = small_state(7)
    del state["scaler"]
    save_checkpoint(tmp_path / "best.pt", state)
    with pytest.raises(InputError, match=r"best\.pt: incomplete checkpoint, it lacks scaler"):
        load_checkpoint(tmp_path / "best.pt")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_file, "_VERSION", 3)
        save_checkpoint(tmp_path / "best.pt", small_state(7))
    with pytest.raises(InputError, match="checkpoint version 3, this program reads 2"):
        load_checkpoint(tmp_path / "best.pt")
    with pytest.raises(InputError, match="nowhere: no such checkpoint"):
        load_checkpoint(tmp_path / "nowhere")


def test_the_newest_checkpoints_are_kept_and_named_by_age(tmp_path: Path) -> None:
    for iteration in range(1, 6):
        save_last(tmp_path, small_state(iteration), keep=3)
    assert iterations(tmp_path) == {"last.pt": 5, "last-1.pt": 4, "last-2.pt": 3}
    save_last(tmp_path, small_state(6), keep=1)
    assert iterations(tmp_path) == {"last.pt": 6}


def test_a_deleted_last_checkpoint_is_written_again_and_removes_no_other(tmp_path: Path) -> None:
    for iteration in (1, 2):
        save_last(tmp_path, small_state(iteration), keep=2)
    (tmp_path / "last.pt").unlink()
    save_last(tmp_path, small_state(3), keep=2)
    assert iterations(tmp_path) == {"last.pt": 3, "last-1.pt": 1}


def test_what_killed_writers_left_is_no_checkpoint(tmp_path: Path) -> None:
    for name in ("last.pt", "best.pt"):
        save_checkpoint(tmp_path / f".{name}.prcl-0123456789abcdef.tmp", small_state(9))
    assert newest_checkpoint(tmp_path, silent) is None
    with pytest.raises(InputError, match=r"no best\.pt or last\.pt"):
        find_checkpoint(tmp_path)
    save_last(tmp_path, small_state(1), keep=2)
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_damaged_last_checkpoint_is_renamed_and_the_one_before_is_used(tmp_path: Path) -> None:
    for iteration in range(1, 4):
        save_last(tmp_path, small_state(iteration), keep=3)
    damage(tmp_path / "last.pt")
    (tmp_path / "last-1.pt").write_bytes(b"")
    lines: list[str] = []
    found = newest_checkpoint(tmp_path, lines.append)
    assert found is not None
    assert found[0] == tmp_path / "last-2.pt"
    assert found[1]["iteration"] == 1
    assert len(lines) == 2
    assert lines[0].startswith(f"{tmp_path / 'last.pt'}: damaged: its checksum does not match")
    assert lines[1].startswith(f"{tmp_path / 'last-1.pt'}: damaged: truncated")
    assert all(line.endswith("; last-2.pt of iteration 1 is used instead") for line in lines)
    assert iterations(tmp_path) == {"last-2.pt": 1}
    assert {path.name for path in tmp_path.glob("*.damaged")} == {"last.pt.damaged", "last-1.pt.damaged"}
    save_last(tmp_path, small_state(2), keep=3)
    assert iterations(tmp_path) == {"last.pt": 2, "last-2.pt": 1}


def test_if_all_are_damaged_all_are_named_and_left(tmp_path: Path) -> None:
    for iteration in range(1, 3):
        save_last(tmp_path, small_state(iteration), keep=2)
    for name in ("last.pt", "last-1.pt"):
        damage(tmp_path / name)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"last\.pt: damaged.*; .*last-1\.pt: damaged"):
        newest_checkpoint(tmp_path, silent)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_checkpoint_of_an_older_version_is_not_passed_over(tmp_path: Path) -> None:
    for iteration in range(1, 3):
        save_last(tmp_path, small_state(iteration), keep=2)
    (tmp_path / "last.pt").write_bytes(_version_1(b""))
    with pytest.raises(InputError, match=r"last\.pt: made by an older version"):
        newest_checkpoint(tmp_path, silent)
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "last-1.pt"}


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path, silent) is None
    assert newest_checkpoint(tmp_path / "nowhere", silent) is None


def test_evaluation_takes_the_best_else_the_newest_last_checkpoint(tmp_path: Path) -> None:
    for iteration in range(1, 3):
        save_last(tmp_path, small_state(iteration), keep=2)
    (tmp_path / "last-x.pt").write_bytes(b"")
    assert find_checkpoint(tmp_path) == tmp_path / "last.pt"
    (tmp_path / "last.pt").unlink()
    assert find_checkpoint(tmp_path) == tmp_path / "last-1.pt"
    save_checkpoint(tmp_path / "best.pt", small_state(1))
    assert find_checkpoint(tmp_path) == tmp_path / "best.pt"


def test_a_damaged_best_checkpoint_is_an_error_that_names_the_others(tmp_path: Path) -> None:
    write_run(tmp_path, tiny_tree(tmp_path))
    shutil.copy(tmp_path / "best.pt", tmp_path / "last.pt")
    damage(tmp_path / "best.pt")
    with pytest.raises(InputError, match=r"best\.pt: damaged: .*; beside it: last\.pt$"):
        load_run(tmp_path, CPU)
    assert load_run(tmp_path / "last.pt", CPU).iteration == 40
    (tmp_path / "last.pt").unlink()
    with pytest.raises(InputError, match=r"best\.pt: damaged: .*; no other checkpoint is beside it$"):
        load_run(tmp_path, CPU)
