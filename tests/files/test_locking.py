"""The lock of an output folder: one process writes there, another is told which, and a crash releases it."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from prcl_fast.errors import InputError
from prcl_fast.files import locking
from prcl_fast.files.locking import INHERITED, LOCK, FolderInUseError, FolderLock, locked_folder

pytestmark = pytest.mark.timeout(60)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_child(function: Callable[[], None]) -> int:
    """Forks a process that calls `function` and says when it is done; returns its id."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        function()
        os.write(writer, b"x")
        signal.pause()
    os.close(writer)
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_second_process_is_told_who_holds_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/prcl_fast/cli/main.py", "train", "a\nb.yaml"])
    child = in_child(lambda: globals().update(lock=FolderLock(tmp_path, "output")))
    before = (tmp_path / LOCK).read_bytes()
    with pytest.raises(FolderInUseError) as caught:
        FolderLock(tmp_path, "output")
    line = str(caught.value)
    assert line.startswith(
        f"output: {tmp_path} is in use by process {child} on {os.uname().nodename} since 2"
    )
    assert line.endswith(": prcl train a b.yaml; wait for its end, or choose another folder")
    assert (tmp_path / LOCK).read_bytes() == before
    kill(child)
    FolderLock(tmp_path, "output").release()
    assert names(tmp_path) == []


def test_a_worker_that_outlives_its_killed_process_holds_no_lock(tmp_path: Path) -> None:
    workers = tmp_path / "workers"

    def hold_and_fork() -> None:
        globals().update(lock=FolderLock(tmp_path, "output"))
        worker = os.fork()
        if not worker:
            signal.pause()
        workers.write_text(str(worker))

    kill(in_child(hold_and_fork))
    worker = int(workers.read_text())
    os.kill(worker, 0)  # it runs
    FolderLock(tmp_path, "output").release()
    os.kill(worker, signal.SIGKILL)


def test_the_lock_goes_to_a_started_process_and_stays_with_it(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path, "output")
    assert lock.descriptor is not None
    script = (
        "import sys; from pathlib import Path; from prcl_fast.files.locking import locked_folder\n"
        "with locked_folder(Path(sys.argv[1]), 'output'):\n"
        "    print('held', flush=True); sys.stdin.readline()"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(
        command,
        text=True,
        env=os.environ | {INHERITED: str(lock.descriptor)},
        pass_fds=[lock.descriptor],
        **pipes,
    ) as process:
        assert process.stdout.readline() == "held\n"
        lock.forget()  # as if this process were killed
        with pytest.raises(FolderInUseError, match=rf"in use by process {process.pid} on "):
            FolderLock(tmp_path, "output")
        assert process.communicate("\n") == ("", "")
    assert process.returncode == 0
    assert names(tmp_path) == []


@pytest.mark.parametrize("text", ["1", "99999", "x", "-1", "9" * 5000])
def test_a_descriptor_of_another_file_is_not_taken_for_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv(INHERITED, text)
    lock = FolderLock(tmp_path, "output")
    with pytest.raises(FolderInUseError):
        FolderLock(tmp_path, "output")
    lock.release()


def test_a_new_folder_goes_again_where_nothing_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with pytest.raises(ZeroDivisionError), locked_folder(folder, "output"):
        assert names(folder) == [LOCK] == [1 / 0]
    assert names(tmp_path) == []
    (tmp_path / "a").mkdir()
    with locked_folder(folder, "output"):
        (folder / "file").write_text("")
    assert names(folder) == ["file"]
    (tmp_path / "empty").mkdir()
    with locked_folder(tmp_path / "empty", "output"):
        pass
    assert names(tmp_path) == ["a", "empty"]


def test_a_folder_made_anew_under_the_holder_has_another_lock(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    former = FolderLock(folder, "output")
    folder.rename(tmp_path / "moved")
    folder.mkdir()
    lock = FolderLock(folder, "output")
    former.release()
    with pytest.raises(FolderInUseError):
        FolderLock(folder, "output")
    lock.release()


MAKERS: dict[str, Callable[[Path], object]] = {
    "a link": lambda path: path.symlink_to(path.parent / "victim"),
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_lock_file_is_no_link_or_pipe(tmp_path: Path, kind: str) -> None:
    (tmp_path / "victim").write_text("precious")
    MAKERS[kind](tmp_path / LOCK)
    with pytest.raises(InputError, match=rf"{LOCK}: cannot be written: it is {kind}$"):
        FolderLock(tmp_path, "output")
    (tmp_path / LOCK).rename(tmp_path / "other")
    assert (tmp_path / "victim").read_text() == "precious"


def test_nothing_is_written_into_a_file_of_two_names(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    os.link(tmp_path / "victim", tmp_path / LOCK)
    FolderLock(tmp_path, "output").release()
    assert (tmp_path / "victim").read_text() == "precious"
    assert names(tmp_path) == ["victim"]


def test_a_file_system_without_locks_is_noted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    locking._say_no_locks.cache_clear()
    with caplog.at_level(logging.WARNING):
        for name in "ab":
            with locked_folder(tmp_path / name, "output"):
                (tmp_path / name / "file").write_text("")
    assert [names(tmp_path / name) for name in "ab"] == [["file"]] * 2
    (message,) = caplog.messages
    assert message.startswith("no locks on this file system (No locks available): ")


def test_a_link_to_the_folder_leads_to_the_same_lock(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to("disk")
    with (
        locked_folder(tmp_path / "runs" / "a", "output"),
        pytest.raises(FolderInUseError),
        locked_folder(tmp_path / "disk" / "a", "output"),
    ):
        pass
