"""Writing files: whole or not at all, never through a link, and one line for every failure."""

from __future__ import annotations

import ast
import io
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from prcl_fast.errors import WriteError
from prcl_fast.files.writing import (
    append,
    open_append,
    remove_leftovers,
    replacing,
    sync_file,
    write_bytes,
    write_text,
)
from support.paths import PACKAGE
from support.run_folders import file_size_limit

needs_user = pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_is_written_as_utf_8_into_a_new_folder(tmp_path: Path) -> None:
    write_text(tmp_path / "a/b/c.txt", "é\r\n")
    assert (tmp_path / "a/b/c.txt").read_bytes() == b"\xc3\xa9\r\n"
    assert names(tmp_path / "a/b") == ["c.txt"]


def test_a_durable_file_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"run/last\.pt: cannot be written: No such file or directory$"):
        write_bytes(tmp_path / "run/last.pt", b"x", durable=True)
    assert names(tmp_path) == []


def test_a_file_has_the_mode_that_the_users_mask_leaves(tmp_path: Path) -> None:
    former = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a", b"x")
        append(tmp_path / "b", b"x")
    finally:
        os.umask(former)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_the_former_file_stays_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(b"former")
    with replacing(path) as file:
        np.save(file, np.arange(3))
        file.flush()
        assert path.read_bytes() == b"former"
        assert len(names(tmp_path)) == 2
    assert np.load(path).tolist() == [0, 1, 2]
    assert names(tmp_path) == ["a.npy"]


def fail_while_writing(path: Path, error: type[BaseException], durable: bool) -> None:
    with replacing(path, durable=durable) as file:
        file.write(b"new")
        raise error


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_the_former_file_alone(
    tmp_path: Path, error: type[BaseException], durable: bool
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"former")
    with pytest.raises(error):
        fail_while_writing(path, error, durable)
    assert path.read_bytes() == b"former"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("size", [100, 1 << 20], ids=["in the buffer", "beyond it"])
def test_a_full_disk_leaves_the_former_file_and_no_other(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"former")
    with file_size_limit(50), pytest.raises(WriteError) as caught:
        write_bytes(path, bytes(size))
    assert str(caught.value) == f"{path}: cannot be written: File too large"
    assert path.read_bytes() == b"former"
    assert names(tmp_path) == ["a"]


@needs_user
def test_a_read_only_folder_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        for write in (write_bytes, append):
            with pytest.raises(WriteError, match=r"/a: cannot be written: Permission denied$"):
                write(tmp_path / "a", b"x")
    finally:
        tmp_path.chmod(0o700)
    assert names(tmp_path) == []


@pytest.mark.parametrize("place", ["file/a", "folder", "/proc/none"])
@pytest.mark.parametrize("write", [write_bytes, append], ids=["write_bytes", "append"])
def test_a_place_that_takes_no_file_is_named(
    tmp_path: Path, place: str, write: Callable[[Path, bytes], None]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError, match=rf"{place}: cannot be written: ") as caught:
        write(tmp_path / place, b"x")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["file", "folder"]


MAKERS: dict[str, Callable[[Path], object]] = {
    "a link": lambda path: path.symlink_to(path.parent / "victim"),
    "a pipe": os.mkfifo,
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", MAKERS)
def test_a_link_or_pipe_is_replaced(tmp_path: Path, kind: str) -> None:
    (tmp_path / "victim").write_text("precious")
    MAKERS[kind](tmp_path / "a")
    write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", MAKERS)
def test_nothing_is_appended_to_a_link_or_pipe(tmp_path: Path, kind: str) -> None:
    (tmp_path / "victim").write_text("precious")
    MAKERS[kind](tmp_path / "a")
    for use in (lambda path: append(path, b"x"), open_append, sync_file):
        with pytest.raises(WriteError, match=rf"/a: cannot be written: it is {kind}$"):
            use(tmp_path / "a")
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.timeout(20)
def test_a_pipe_that_has_a_reader_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "a")
    reader = os.open(tmp_path / "a", os.O_RDONLY | os.O_NONBLOCK)

    def missing(path: Path) -> os.stat_result:
        raise FileNotFoundError

    monkeypatch.setattr(os, "lstat", missing)  # as if the pipe were made right after the check
    with pytest.raises(WriteError, match=r"it is a pipe$"):
        append(tmp_path / "a", b"x")
    os.set_blocking(reader, False)
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_lines_are_appended_at_the_end_and_in_a_new_file(tmp_path: Path) -> None:
    for line in (b"1\n", b"2\n"):
        append(tmp_path / "a", line)
    with open_append(tmp_path / "a") as file:
        assert os.get_blocking(file.fileno())
        assert file.seek(0, io.SEEK_END) == 4
    assert (tmp_path / "a").read_bytes() == b"1\n2\n"


def write_often(path: Path, letter: bytes) -> None:
    for size in range(1, 200):
        write_bytes(path, letter * 1000 * size)


def test_two_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(path, letter)) for letter in (b"x", b"y")]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            seen.add(len(set(path.read_bytes())))
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen == {1}
    assert len(path.read_bytes()) == 199_000
    assert names(tmp_path) == ["a"]


def test_only_our_own_plain_leftovers_are_removed(tmp_path: Path) -> None:
    with replacing(tmp_path / "a"):
        (name,) = names(tmp_path)
    (tmp_path / "a").rename(tmp_path / name)
    other = name.replace(".a.", ".other.")
    (tmp_path / other).write_text("")
    others = ["a.tmp", ".a.tmp", ".a.prcl-0.tmp", "a.prcl-0123456789abcdef.tmp"]
    for kept in others:
        (tmp_path / kept).write_text("")
    link, folder = ".a.prcl-0000000000000000.tmp", ".a.prcl-1111111111111111.tmp"
    (tmp_path / link).symlink_to("a.tmp")
    (tmp_path / folder).mkdir()
    remove_leftovers(tmp_path, "a")
    assert names(tmp_path) == sorted([*others, link, folder, other])
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*others, link, folder])


# Writes that open no file by its name within reach of others: into /proc, and into a folder just made.
OWN_WRITES = {
    "machine/memory.py": {"_CLEAR_REFS.write_text"},
    "data/sources/synthetic.py": {"Image.fromarray(image).save"},
}


def writes_by_name(source: str) -> set[str]:
    """The calls in a module that open a file for writing by its name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        name = function.rpartition(".")[2]
        targets = {ast.unparse(argument) for argument in node.args}
        modes = [argument.value for argument in node.args[:2] if isinstance(argument, ast.Constant)]
        opens = name == "open" and any(set(str(mode)) & set("wax+") for mode in modes)
        saves = name in ("save", "savefig") or (name in ("write_text", "write_bytes") and "." in function)
        if (opens or saves) and not targets & {"file", "archive"}:  # open files
            found.add(function)
    return found


def test_the_package_writes_files_with_this_module_alone() -> None:
    files = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    found = {name: writes_by_name(path.read_text()) for name, path in files.items()}
    assert {name: calls for name, calls in found.items() if calls} == OWN_WRITES


@pytest.mark.parametrize(
    "source",
    [
        'open(path, "w")',
        'path.open("ab")',
        "path.write_text(text)",
        "np.save(path, x)",
        "figure.savefig(path)",
    ],
)
def test_a_write_by_name_is_found(source: str) -> None:
    assert writes_by_name(source)


def test_a_name_of_the_largest_length_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("\u00e9" * 127 + "x")  # 255 bytes
    write_text(path, "all of it")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
