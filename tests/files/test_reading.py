"""Reading files that users name: bounded, plain files alone, and without waiting for anybody."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prcl_fast.errors import InputError
from prcl_fast.files import reading
from prcl_fast.files.reading import read_bytes

pytestmark = pytest.mark.timeout(20)


def test_a_part_of_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"0123456789")
    assert read_bytes(path, "log", 10) == b"0123456789"
    assert read_bytes(path, "log", 10, tail=4) == b"6789"
    assert read_bytes(path, "log", 10, after=8, tail=4) == b"89"
    assert read_bytes(path, "log", 10, after=12) == b""
    assert read_bytes(path, "log", 10, tail=40) == b"0123456789"
    with pytest.raises(InputError, match=r"log: 10 bytes; a log has at most 9$"):
        read_bytes(path, "log", 9, tail=4)


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a device"])
def test_a_special_file_that_takes_the_name_after_the_check_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    monkeypatch.setattr(reading, "check_regular", lambda *_: 0)
    {"a pipe": os.mkfifo, "a folder": Path.mkdir, "a device": lambda path: path.symlink_to("/dev/zero")}[
        kind
    ](path)
    with pytest.raises(InputError, match=r"metrics\.jsonl: cannot be read"):
        read_bytes(path, "metrics file", 100)


def test_a_file_that_waits_for_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    os.mkfifo(path)
    writer = os.open(path, os.O_RDWR)
    # As some files of /proc, which are plain files by their mode.
    monkeypatch.setattr(reading, "special_kind", lambda mode: None)
    with pytest.raises(InputError, match=r"log: cannot be read as a log: it holds nothing yet$"):
        read_bytes(path, "log", 100)
    os.close(writer)


def test_an_endless_file_of_size_0_is_bounded() -> None:
    assert len(read_bytes(Path("/proc/self/pagemap"), "log", 1 << 40)) <= 1 << 20
