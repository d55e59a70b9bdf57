"""Folders to write: whole or not at all, never through a link inside a run, and private ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prcl_fast.errors import InputError, WriteError
from prcl_fast.files.folders import make_private_folder, make_subfolder
from prcl_fast.files.writing import make_folder, replacing_folder, write_bytes


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "set"
    with (
        pytest.raises(WriteError, match=r"cannot be written: Is a directory"),
        replacing_folder(path) as folder,
    ):
        write_bytes(folder, b"")
    assert names(tmp_path / "new") == []
    with replacing_folder(path) as folder:
        (folder / "a").write_text("1")
    assert names(tmp_path / "new") == ["set"]
    assert (path / "a").read_text() == "1"
    with pytest.raises(InputError, match=r"set: exists already and is not an empty"), replacing_folder(path):
        pass
    assert names(path) == ["a"]
    assert names(tmp_path / "new") == ["set"]


def write_folder(path: Path) -> None:
    with replacing_folder(path) as folder:
        (folder / "a").write_text("1")


def test_of_two_writers_of_one_folder_the_first_wins(tmp_path: Path) -> None:
    path = tmp_path / "set"
    with pytest.raises(WriteError, match=r"set: cannot be written: "), replacing_folder(path):
        write_folder(path)
    assert (path / "a").read_text() == "1"
    assert names(tmp_path) == ["set"]


def test_an_empty_folder_is_replaced_also_where_the_user_linked_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "set").symlink_to("disk")
    with replacing_folder(tmp_path / "set") as folder:
        (folder / "a").write_text("1")
    assert (tmp_path / "set").is_symlink()
    assert names(tmp_path / "disk") == ["a"]
    for name in ("a", "b"):
        (tmp_path / name).symlink_to("missing")
        with pytest.raises(InputError, match=f"{name}: exists already"), replacing_folder(tmp_path / name):
            pass
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in (".", tmp_path / "work"):
        with pytest.raises(InputError, match=r"is the working directory"), replacing_folder(Path(name)):
            pass


def test_a_folder_that_cannot_be_made_names_the_key(tmp_path: Path) -> None:
    make_folder(tmp_path / "a/b", "--out")
    make_folder(tmp_path / "a/b", "--out")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as caught:
        make_folder(tmp_path / "file/b", "--out")
    assert str(caught.value) == f"--out: {tmp_path}/file/b cannot be written: Not a directory"


def test_a_folder_inside_an_output_is_no_link_and_no_file(tmp_path: Path) -> None:
    make_subfolder(tmp_path / "a")
    make_subfolder(tmp_path / "a")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "dangling").symlink_to("none")
    (tmp_path / "file").write_text("")
    for name, kind in (("link", "a link"), ("dangling", "a link"), ("file", "no folder")):
        with pytest.raises(WriteError, match=rf"{name}: cannot be written: it is {kind}; remove it$"):
            make_subfolder(tmp_path / name)
    assert names(tmp_path) == ["a", "dangling", "file", "link"]


def test_a_private_folder_is_closed_to_others(tmp_path: Path) -> None:
    former = os.umask(0)
    try:
        (tmp_path / "open").mkdir(mode=0o777)
    finally:
        os.umask(former)
    for name in ("open", "new/below"):
        make_private_folder(tmp_path / name)
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o700
