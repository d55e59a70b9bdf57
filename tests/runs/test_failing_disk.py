"""Saves on a failing disk or by a killed process: an undamaged checkpoint always remains, and is named."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from prcl_fast.errors import RunError
from prcl_fast.files.writing import remove_leftovers
from prcl_fast.runs.checkpoint import find_checkpoint, newest_checkpoint, save_checkpoint, save_last
from support.run_folders import file_size_limit, iterations, silent, small_state


class PowerCut(BaseException):
    """The process is gone."""


class Disk:
    """Counts what changes the disk and fails at the n-th: with an OSError, or for good with a PowerCut."""

    def __init__(self, patch: pytest.MonkeyPatch, failing: int, error: type[BaseException]) -> None:
        self.count, self.failing, self.error = 0, failing, error
        self._open, self._fdopen = os.open, os.fdopen
        for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink")):
            patch.setattr(owner, name, self._wrapped(getattr(owner, name)))
        patch.setattr(os, "open", self._opened)
        patch.setattr(os, "fdopen", lambda number, mode: TornFile(self._fdopen(number, mode, 0), self))

    def reach(self) -> None:
        self.count += 1
        if self.count == self.failing or (self.count > self.failing and self.error is PowerCut):
            raise PowerCut if self.error is PowerCut else OSError(errno.EIO, os.strerror(errno.EIO))

    def _wrapped(self, function: Callable) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            self.reach()
            return function(*arguments, **options)

        return call

    def _opened(self, path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            self.reach()
        return self._open(path, flags, mode)


class TornFile:
    """A file whose writes may end half-way."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self._file, self._disk = file, disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: memoryview) -> None:
        self._file.write(data[: len(data) // 2])
        self._disk.reach()
        self._file.write(data[len(data) // 2 :])


def fail_at_every_step(
    tmp_path: Path, error: type[BaseException], before: int, keep: int
) -> list[tuple[Path, BaseException]]:
    """For each n, a folder with `before` saves whose next save met `error` at its n-th step."""
    failed: list[tuple[Path, BaseException]] = []
    for step in itertools.count(1):
        folder = tmp_path / str(step)
        folder.mkdir()
        for iteration in range(1, before + 1):
            save_last(folder, small_state(iteration), keep + 1)  # one more than the next save keeps
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, step, error)
            try:
                save_last(folder, small_state(before + 1), keep)
            except (PowerCut, RunError) as raised:
                failed.append((folder, raised))
        if disk.count < step:
            return failed
    raise AssertionError


@pytest.mark.parametrize(("before", "keep"), [(0, 1), (1, 1), (0, 2), (1, 2), (4, 2), (4, 3)])
def test_a_run_killed_at_any_step_of_a_save_goes_on_from_it_or_the_one_before(
    tmp_path: Path, before: int, keep: int
) -> None:
    failed = fail_at_every_step(tmp_path, PowerCut, before, keep)
    assert len(failed) >= 6  # create, write, fsync, fsync again, rename, the folder's fsync
    reached = set()
    for folder, _ in failed:
        found = newest_checkpoint(folder, silent)
        if found is None:
            assert before == 0
            reached.add(0)
        else:
            path, state = found
            assert state["iteration"] in {before, before + 1}
            assert find_checkpoint(folder) == path
            reached.add(state["iteration"])
        remove_leftovers(folder)  # as the next start does
        save_last(folder, small_state(50), keep)
        save_last(folder, small_state(51), keep)
        left = iterations(folder)
        assert (left["last.pt"], left.get("last-1.pt")) == (51, 50 if keep > 1 else None)
        assert len(left) <= keep
        assert not list(folder.glob(".*"))
    assert reached == {before, before + 1}


@pytest.mark.parametrize(("before", "keep"), [(0, 1), (1, 1), (1, 2), (4, 3)])
def test_an_error_at_any_step_of_a_save_says_what_is_whole_and_leaves_no_temporary_file(
    tmp_path: Path, before: int, keep: int
) -> None:
    failed = fail_at_every_step(tmp_path, OSError, before, keep)
    assert len(failed) >= 6
    for folder, raised in failed:
        found = newest_checkpoint(folder, silent)
        rest = "no whole last.pt is beside it"
        if found is not None:
            assert found[1]["iteration"] in {before, before + 1}
            rest = f"{found[0].name} of iteration {found[1]['iteration']} is whole"
        assert str(raised) == f"{folder / 'last.pt'}: cannot be written: Input/output error; {rest}"
        assert not list(folder.glob(".*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("last.pt", lambda folder: save_last(folder, small_state(4), keep=2)),
        ("best.pt", lambda folder: save_checkpoint(folder / "best.pt", small_state(4))),
    ],
)
def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, save: Callable[[Path], None]
) -> None:
    save_last(tmp_path, small_state(3), keep=2)

    def open_on_full_disk(descriptor: int, mode: str) -> BinaryIO:
        os.close(descriptor)
        return open("/dev/full", mode)

    monkeypatch.setattr(os, "fdopen", open_on_full_disk)
    message = rf"{name}: cannot be written: No space left on device; last\.pt of iteration 3 is whole$"
    with pytest.raises(RunError, match=message):
        save(tmp_path)
    assert iterations(tmp_path) == {"last.pt": 3}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_deleted_under_the_run_is_not_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    save_last(folder, small_state(1), keep=2)
    shutil.rmtree(folder)
    with pytest.raises(RunError, match=r"last\.pt: cannot be written: No such file or directory; no whole"):
        save_last(folder, small_state(2), keep=2)
    assert not folder.exists()


@pytest.mark.parametrize("folder", ["file", "/proc"])
def test_a_place_that_takes_no_files_is_named(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"last\.pt: cannot be written: .*; no whole last\.pt is beside it"):
        save_last(tmp_path / folder, small_state(1), keep=2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_a_folder_made_read_only_keeps_its_checkpoint(tmp_path: Path) -> None:
    save_last(tmp_path, small_state(1), keep=2)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunError, match=r"Permission denied; last\.pt of iteration 1 is whole"):
            save_last(tmp_path, small_state(2), keep=2)
    finally:
        tmp_path.chmod(0o700)


def test_a_limit_on_the_size_of_files_ends_the_save_in_one_line(tmp_path: Path) -> None:
    save_last(tmp_path, small_state(1), keep=2)
    message = r"last\.pt: cannot be written: File too large; last\.pt of iteration 1 is whole$"
    with file_size_limit(1 << 16), pytest.raises(RunError, match=message):
        save_last(tmp_path, small_state(2, size=1 << 18), keep=2)
    assert iterations(tmp_path) == {"last.pt": 1}
    assert len(list(tmp_path.iterdir())) == 1
