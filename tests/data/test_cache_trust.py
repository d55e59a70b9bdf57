"""Caches trust their own user's files alone, and check what these hold before they use it."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prcl_fast.config import DataConfig
from prcl_fast.data.cache import decoded as cache_module
from prcl_fast.data.cache import file as cache_file
from prcl_fast.data.cache.decoded import ImageCache, open_cache
from prcl_fast.data.sources import build_source
from prcl_fast.errors import InputError

pytestmark = pytest.mark.timeout(60)
NAMES = ("labeled_0", "unlabeled_0", "val_0")
SIZE = (40, 48)


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """One image for each subset, of two classes, and a cache on disk."""
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for place, name in enumerate(NAMES):
        Image.fromarray(np.full((*SIZE, 3), 10 + place, dtype=np.uint8)).save(tmp_path / f"images/{name}.png")
        Image.fromarray(np.ones(SIZE, dtype=np.uint8)).save(tmp_path / f"labels/{name}.png")
        (tmp_path / f"{name.split('_')[0]}.txt").write_text(name)
    return DataConfig(
        kind="folder",
        root=tmp_path,
        **{name.split("_")[0]: tmp_path / f"{name.split('_')[0]}.txt" for name in NAMES},
        classes=["a", "b"],
        cache="disk",
        cache_dir=tmp_path / "cache",
    )


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of /dev/shm."""
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(cache_module, "_SHARED_MEMORY", tmp_path / "shm")
    return tmp_path / "shm"


def opened(data: DataConfig) -> ImageCache:
    return open_cache(build_source(data), data, ("labeled", "unlabeled"))


def own(base: Path) -> Path:
    return base / f"prcl_fast-{os.geteuid()}"


def kind(data: DataConfig, memory: Path, name: str) -> tuple[DataConfig, Path]:
    base = memory if name == "ram" else data.cache_dir
    assert base is not None
    return data.model_copy(update={"cache": name}), own(base)


@pytest.mark.parametrize("name", ["ram", "disk"])
def test_folder_and_files_are_the_users_alone(data: DataConfig, memory: Path, name: str) -> None:
    settings, folder = kind(data, memory, name)
    former = os.umask(0)
    try:
        folder.mkdir(mode=0o777, parents=True)
        path = opened(settings).path
    finally:
        os.umask(former)
    assert path.parent == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [file.stat().st_mode & 0o777 for file in folder.iterdir()] == [0o600] * 2


@pytest.mark.parametrize("name", ["ram", "disk"])
def test_a_folder_that_is_a_link_is_refused_and_its_target_left_alone(
    data: DataConfig, memory: Path, tmp_path: Path, name: str
) -> None:
    settings, folder = kind(data, memory, name)
    project = tmp_path / "project"
    project.mkdir(mode=0o777)
    for file in ("uv.lock", "uv.images", "Cargo.lock"):
        (project / file).write_text("precious")
    before = project.stat()
    folder.parent.mkdir(exist_ok=True)
    folder.symlink_to(project)
    with pytest.raises(InputError, match=rf"data\.cache: {folder}: cannot be written: it is a link; remove"):
        opened(settings)
    assert sorted(file.name for file in project.iterdir()) == ["Cargo.lock", "uv.images", "uv.lock"]
    assert (project.stat().st_mode, project.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


def test_a_folder_of_another_user_is_refused(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(InputError, match=r"data\.cache: .*: cannot be used: it belongs to another user$"):
        opened(data)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs two users")
def test_two_users_share_a_cache_dir(data: DataConfig) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(shutil.copytree(data.root, Path(name) / "data"))
        root.parent.chmod(0o755)
        root.chmod(0o755)
        (root.parent / "cache").mkdir()
        (root.parent / "cache").chmod(0o1777)
        lists = {subset: root / f"{subset}.txt" for subset in ("labeled", "unlabeled", "val")}
        shared = data.model_copy(update={"root": root, "cache_dir": root.parent / "cache", **lists})
        first = opened(shared).path
        child = os.fork()
        if not child:
            status = 1
            try:
                os.setuid(61001)
                status = 0 if opened(shared).path.parent.name == "prcl_fast-61001" else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert sorted(path.name for path in first.parents[1].iterdir()) == ["prcl_fast-0", "prcl_fast-61001"]
        assert first.exists()


def test_in_memory_only_own_names_are_removed(data: DataConfig, memory: Path) -> None:
    settings, folder = kind(data, memory, "ram")
    folder.mkdir()
    stranger = "0" * 24
    for name in ("uv.lock", "uv.images", f"{stranger}.lock", f"{stranger}.images"):
        (folder / name).write_text("")
    path = opened(settings).path
    left = {file.name for file in folder.iterdir()} - {path.name, path.with_suffix(".lock").name}
    assert left == {"uv.lock", "uv.images"}


def test_a_file_on_disk_that_is_long_unused_goes_with_the_next_build(data: DataConfig) -> None:
    folder = own(data.cache_dir)
    former, used = opened(data).path, time.time()
    assert abs(former.stat().st_mtime - used) < 3600
    kept = folder / ("1" * 24 + ".images")
    for path in (kept, kept.with_suffix(".lock"), folder / "mine.lock"):
        path.write_text("")
    old = used - 31 * 86400
    for path in [*folder.iterdir()]:
        if path != kept:
            os.utime(path, (old, old))
    lines: list[str] = []
    other = data.model_copy(update={"label_map": {1: 0}})
    cache_module.use_until_exit(former, remove=False)  # marks it as used now
    os.utime(former, (old, old))
    open_cache(build_source(other), other, ("labeled", "unlabeled"), lines.append)
    assert former.exists()  # this process uses it
    assert kept.exists()
    gone = folder / ("2" * 24 + ".images")
    for path in (gone, gone.with_suffix(".lock")):
        path.write_text("")
        os.utime(path, (old, old))
    other = data.model_copy(update={"ignore": 7})
    open_cache(build_source(other), other, ("labeled", "unlabeled"), lines.append)
    assert not gone.exists()
    assert not gone.with_suffix(".lock").exists()
    assert (folder / "mine.lock").exists()
    assert [line for line in lines if "removed" in line] == [
        f"data.cache: removed {gone}, which was not used for 30 days"
    ]


def test_other_pixels_of_the_same_size_and_time_are_found(data: DataConfig) -> None:
    before = opened(data).path
    image = data.root / "images/labeled_0.png"
    state = image.stat()
    content = image.read_bytes()
    Image.fromarray(np.full((*SIZE, 3), 99, dtype=np.uint8)).save(image)
    image.write_bytes(image.read_bytes().ljust(len(content), b"\0")[: len(content)])
    os.utime(image, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (image.stat().st_size, image.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    after = opened(data)
    assert after.path != before
    assert (after.image("labeled", 0)[..., :3] == 99).all()


def crafted(entries: list[tuple[int, int, int, int]], body: bytes, count: int | None = None) -> bytes:
    """A file of the cache with any index and right checksums."""
    index = np.array(entries, dtype=cache_file._INDEX).tobytes()
    content = bytes(64) + body + index
    header = cache_file._HEADER.pack(
        *(cache_file._MAGIC, cache_file.VERSION, zlib.crc32(index)),
        *(len(entries) if count is None else count, len(content)),
    )
    header += cache_file._CHECKSUM.pack(zlib.crc32(header))
    return header + content[len(header) :]


PIXELS = bytes(64 * 64 * 4)
CRC = zlib.crc32(PIXELS)
BAD_LABEL = bytes([1, 2, 3, 200]) * 4096
CRAFTED = {
    "class id 200": crafted([(64, 64, 64, zlib.crc32(BAD_LABEL))] * 2, BAD_LABEL),
    "negative offset": crafted([(-64, 64, 64, 0)] * 2, PIXELS),
    "negative height": crafted([(64, -64, 64, 0)] * 2, PIXELS),
    "both sides negative": crafted([(64, -64, -64, CRC)] * 2, PIXELS),
    "no pixels": crafted([(64, 0, 0, 0)] * 2, PIXELS),
    "wide and empty": crafted([(64, 0, 2**31 - 1, 0)] * 2, PIXELS),
    "beyond the end": crafted([(2**40, 64, 64, 0)] * 2, PIXELS),
    "huge": crafted([(64, 2**31 - 1, 2**31 - 1, 0)] * 2, PIXELS),
    "in the index": crafted([(64 * 64 * 4, 64, 64, 0)] * 2, PIXELS),
    "unaligned": crafted([(65, 63, 64, zlib.crc32(PIXELS[: 63 * 64 * 4]))] * 2, PIXELS),
    "2^60 images": crafted([(64, 64, 64, CRC)] * 2, PIXELS, count=2**60),
    "more images": crafted([(64, 64, 64, CRC)] * 3, PIXELS),
}
PUT: dict[str, Callable[[Path], object]] = {
    **{name: lambda path, content=content: path.write_bytes(content) for name, content in CRAFTED.items()},
    "a pipe": os.mkfifo,
    "a link": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a terabyte of nothing": lambda path: (path.touch(), os.truncate(path, 2**40)),
    "writable by others": lambda path: (path.write_bytes(b"x" * 100), path.chmod(0o666)),
}


@pytest.mark.parametrize("content", PUT)
def test_a_file_that_cannot_be_right_is_built_again(
    data: DataConfig, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    path = opened(data).path
    path.unlink()
    PUT[content](path)
    if content in CRAFTED:
        path.chmod(0o600)
    with caplog.at_level(logging.WARNING):
        cache = opened(data)
    (message,) = caplog.messages
    assert message.startswith(f"{path}: ")
    assert message.endswith("; it is built again")
    assert (cache.image("unlabeled", 0)[..., :3] == 11).all()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs two users")
def test_a_file_of_another_user_is_built_again(data: DataConfig, caplog: pytest.LogCaptureFixture) -> None:
    path = opened(data).path
    os.chown(path, 61001, 61001)
    with caplog.at_level(logging.WARNING):
        opened(data)
    assert caplog.messages == [f"{path}: it belongs to another user; it is built again"]
    assert path.stat().st_uid == 0


def test_a_folder_in_place_of_the_file_is_one_line(data: DataConfig) -> None:
    path = opened(data).path
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=rf"data\.cache: {path}: "):
        opened(data)


@pytest.mark.parametrize("kind", ["a link", "a pipe"])
def test_a_lock_of_the_cache_is_no_link_or_pipe(data: DataConfig, tmp_path: Path, kind: str) -> None:
    lock = opened(data).path.with_suffix(".lock")
    lock.unlink()
    if kind == "a link":
        lock.symlink_to(tmp_path / "victim")
    else:
        os.mkfifo(lock)
    with pytest.raises(InputError, match=rf"data\.cache: {lock}: cannot be written: it is {kind}$"):
        opened(data)
    assert not (tmp_path / "victim").exists()
    shutil.rmtree(lock.parent)
