"""The cache of decoded images: same pixels as without it, built once, never partial, never stale."""

from __future__ import annotations

import contextlib
import errno
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import numpy as np
import pytest
import torch
from PIL import Image

from prcl_fast.config import Config, DataConfig, parse_config
from prcl_fast.data.batches import training_batches, training_cache
from prcl_fast.data.cache import decoded as cache_module
from prcl_fast.data.cache import file as cache_file
from prcl_fast.data.cache.decoded import ImageCache, open_cache
from prcl_fast.data.decode import decode
from prcl_fast.data.prefetch import tensors_of
from prcl_fast.data.source import Source
from prcl_fast.data.sources import build_source
from prcl_fast.errors import InputError

BOTH = ("labeled", "unlabeled")
IMAGES = {"labeled": 3, "unlabeled": 5, "val": 1}


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Images on disk, of different sizes; a cache of kind disk beside them."""
    random = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for subset, count in IMAGES.items():
        names = [f"{subset}_{k}" for k in range(count)]
        (tmp_path / f"{subset}.txt").write_text("\n".join(names))
        for k, name in enumerate(names):
            size = (40 + 3 * k, 60 - 5 * k)
            image = random.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / "images" / f"{name}.png")
            label = random.integers(0, 3, size, dtype=np.uint8)
            if subset != "unlabeled":
                Image.fromarray(label).save(tmp_path / "labels" / f"{name}.png")
    return DataConfig(
        kind="folder",
        root=tmp_path,
        labeled=tmp_path / "labeled.txt",
        unlabeled=tmp_path / "unlabeled.txt",
        val=tmp_path / "val.txt",
        classes=["a", "b", "c"],
        crop=[32, 48],
        cache="disk",
        cache_dir=tmp_path / "cache",
        workers=0,
    )


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of /dev/shm; returns the subfolder that will hold the cache."""
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(cache_module, "_SHARED_MEMORY", tmp_path / "shm")
    return tmp_path / "shm" / f"prcl_fast-{os.getuid()}"


def run_config(data: DataConfig, **changes) -> Config:
    tree = {"output": "unused", "data": {"kind": "synthetic"}, "method": {"name": "mean_teacher"}}
    train = {"batch_labeled": 2, "batch_unlabeled": 4}
    parsed = parse_config({**tree, "train": train}, "test")
    return parsed.model_copy(update={"data": data.model_copy(update=changes)})


def assert_pixels(data: DataConfig, cache: ImageCache) -> None:
    """Checks that every image in the cache equals the decoded image."""
    source = build_source(data)
    for subset in BOTH:
        for index, name in enumerate(source.splits[subset].names):
            expected = decode(source, name, subset == "labeled")
            assert np.array_equal(cache.image(subset, index), expected), name


class Counting:
    """A source that counts decoded images."""

    def __init__(self, source: Source) -> None:
        self.source, self.decoded = source, 0

    def __getattr__(self, name: str):
        return getattr(self.source, name)

    def image(self, name: str) -> np.ndarray:
        self.decoded += 1
        return self.source.image(name)


def own(data: DataConfig) -> Path:
    """The user's own folder in `cache_dir`."""
    return data.cache_dir / f"prcl_fast-{os.geteuid()}"


def files(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["disk", "ram"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_bitwise_the_same_with_and_without_a_cache(data, memory, kind, workers):
    lines = []

    def made(settings: Config) -> list[torch.Tensor]:
        source = build_source(settings.data)
        cache = training_cache(source, settings, say=lines.append)
        options = {"start": 0, "device": torch.device("cpu"), "cache": cache}
        stream = training_batches(source, settings, **options)
        with contextlib.closing(stream):
            batches = list(islice(stream, 4))
        return [tensor for batch in batches for tensor in tensors_of(batch)]

    without = made(run_config(data, cache="none"))
    for _ in range(2):  # built, then found
        cached = made(run_config(data, cache=kind, workers=workers))
        assert all(torch.equal(*pair) for pair in zip(without, cached, strict=True))
    assert len(lines) == 2  # when it was built


def test_a_cache_holds_the_decoded_images_and_is_built_once(data):
    source, lines = Counting(build_source(data)), []
    assert_pixels(data, open_cache(source, data, BOTH, lines.append))
    assert source.decoded > 0
    assert lines[0].startswith("data.cache: decoding 8 images into ")
    source.decoded = 0
    assert_pixels(data, open_cache(source, data, BOTH))
    assert source.decoded == 0
    assert files(own(data)) == [".images", ".lock"]


def test_generated_images_are_cached_too(tmp_path):
    tree = {"kind": "synthetic", "synthetic": {"labeled": 2, "unlabeled": 3}}
    data = DataConfig(**tree, cache="disk", cache_dir=tmp_path)
    assert_pixels(data, open_cache(build_source(data), data, BOTH))
    other = data.model_copy(update={"synthetic": data.synthetic.model_copy(update={"seed": 1})})
    assert_pixels(other, open_cache(build_source(other), other, BOTH))


def test_without_unlabeled_images_only_labeled_ones_are_kept(data):
    source, lines = build_source(data), []
    open_cache(source, data, ("labeled",), lines.append)
    assert "decoding 3 images" in lines[0]


def test_a_cache_travels_to_another_process_as_its_path(data):
    cache = open_cache(build_source(data), data, BOTH)
    cache.image("labeled", 0)
    message = pickle.dumps(cache)
    assert len(message) < 1000
    assert_pixels(data, pickle.loads(message))


def test_what_changes_the_pixels_makes_another_cache(data):
    def key(settings: DataConfig) -> str:
        return open_cache(build_source(settings), settings, BOTH).path.name

    keys = {
        key(data),
        key(data.model_copy(update={"label_map": {1: 1, 2: 1}})),
        key(data.model_copy(update={"ignore": 2})),
        key(data.model_copy(update={"classes": ["a", "b", "c", "d"]})),
    }
    assert len(keys) == 4
    assert key(data.model_copy(update={"crop": [16, 16], "workers": 2})) in keys
    Image.fromarray(np.zeros((40, 60), dtype=np.uint8)).save(data.root / "labels" / "labeled_0.png")
    changed = open_cache(build_source(data), data, BOTH)
    assert changed.path.name not in keys
    assert_pixels(data, changed)


@pytest.mark.parametrize("damage", ["pixel", "header", "index", "end", "empty", "version"])
def test_a_damaged_cache_is_built_again_with_one_warning(data, damage, monkeypatch, caplog):
    source = build_source(data)
    path = open_cache(source, data, BOTH).path
    content = bytearray(path.read_bytes())
    position = {"pixel": 1000, "header": 9, "index": len(content) - 3}.get(damage)
    if position is not None:
        content[position] ^= 1
    path.write_bytes({"end": content[:-1], "empty": b""}.get(damage, content))
    if damage == "version":
        monkeypatch.setattr(cache_file, "VERSION", 77)
    with caplog.at_level(logging.WARNING):
        assert_pixels(data, open_cache(source, data, BOTH))
    assert len(caplog.messages) == 1
    assert str(path) in caplog.messages[0]
    assert caplog.messages[0].endswith("; it is built again")


def test_an_unreadable_image_is_named_and_no_half_cache_stays(data):
    broken = data.root / "images" / "unlabeled_4.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(InputError, match=r"unlabeled_4\.png: cannot be decoded"):
        open_cache(build_source(data), data, BOTH)
    assert files(own(data)) == [".lock"]


def test_too_little_room_is_one_line_that_names_the_key(data, memory, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 5000, 5000))
    for kind in ("disk", "ram"):
        settings = data.model_copy(update={"cache": kind})
        with pytest.raises(InputError) as caught:
            open_cache(build_source(settings), settings, BOTH)
        assert f"data.cache: {kind} needs about 0.1 MB for 8 decoded images, but " in str(caught.value)
        assert str(caught.value).endswith(" has 0.0 MB free")
    assert files(own(data)) == files(memory) == [".lock"]


def test_a_disk_that_runs_full_leaves_nothing_behind(data, monkeypatch):
    def full(file: BinaryIO, images) -> int:
        file.write(b"half")
        next(iter(images))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_module, "write_images", full)
    with pytest.raises(InputError, match=r"data\.cache: .* ran full before all 8 images were decoded"):
        open_cache(build_source(data), data, BOTH)
    assert files(own(data)) == [".lock"]


def test_no_shared_memory_and_no_access_are_input_errors(data, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_SHARED_MEMORY", tmp_path / "none")
    settings = data.model_copy(update={"cache": "ram"})
    with pytest.raises(InputError, match=r"data\.cache: ram needs .*none, which this machine does not have"):
        open_cache(build_source(settings), settings, BOTH)
    (tmp_path / "file").write_text("")
    settings = data.model_copy(update={"cache_dir": tmp_path / "file" / "below"})
    with pytest.raises(InputError, match=r"data\.cache: .*below.*: cannot be written: Not a directory"):
        open_cache(build_source(settings), settings, BOTH)


def test_the_default_folder_is_in_the_users_cache(data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    settings = data.model_copy(update={"cache_dir": None})
    path = open_cache(build_source(settings), settings, BOTH).path
    assert path.parent == tmp_path / "xdg" / "prcl_fast" / "images"


def test_a_file_that_is_gone_is_an_input_error_in_a_process_that_opens_it(data):
    cache = pickle.loads(pickle.dumps(open_cache(build_source(data), data, BOTH)))
    cache.path.unlink()
    with pytest.raises(InputError, match=r"data\.cache: .* cannot be opened any more"):
        cache.image("labeled", 0)


class Slow(Counting):
    """A source with slow decoding, which it records in a file."""

    def image(self, name: str) -> np.ndarray:
        with open(self.root / "decoded.txt", "a") as record:
            record.write(f"{name}\n")
        signal.sigtimedwait([], 0.02)
        return self.source.image(name)


def open_slowly(data: DataConfig) -> None:
    source = Slow(build_source(data))
    source.root = data.root
    assert_pixels(data, open_cache(source, data, BOTH))


def test_processes_that_come_at_once_build_one_cache(data):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=open_slowly, args=(data,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    decoded = (data.root / "decoded.txt").read_text().split()
    assert len(decoded) == 8 + 8  # a sample for the room needed, and all


class Killer(Counting):
    """A source that kills its process at one image."""

    def image(self, name: str) -> np.ndarray:
        if name == "unlabeled_4" and self.decoded > 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().image(name)


def open_and_be_killed(data: DataConfig) -> None:
    open_cache(Killer(build_source(data)), data, BOTH)


def test_a_killed_builder_blocks_nobody_and_its_half_file_goes(data):
    process = multiprocessing.get_context("fork").Process(target=open_and_be_killed, args=(data,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert files(own(data)) == [".lock", ".tmp"]
    assert_pixels(data, open_cache(build_source(data), data, BOTH))
    assert files(own(data)) == [".images", ".lock"]


SCRIPT = """
    import sys
    from pathlib import Path
    from prcl_fast.config import DataConfig
    from prcl_fast.data.cache import decoded as cache
    from prcl_fast.data.sources import build_source
    cache._SHARED_MEMORY = Path(sys.argv[1])
    data = DataConfig.model_validate_json(sys.argv[2])
    subsets = ("labeled", "unlabeled")[: int(sys.argv[3])]
    print(cache.open_cache(build_source(data), data, subsets, print).path, flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def user(data: DataConfig, shared: Path, subsets: int = 2):
    """A process that uses a cache in memory: the process, the file, and the lines about building it."""
    settings = data.model_copy(update={"cache": "ram"}).model_dump_json()
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(shared), settings, str(subsets)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        lines = []
        while not (line := process.stdout.readline().strip()).endswith(".images"):
            assert process.poll() is None
            lines.append(line)
        yield SimpleNamespace(process=process, path=Path(line), lines=lines)
        if process.poll() is None:
            process.communicate("\n", timeout=60)


def test_a_cache_in_memory_goes_with_its_last_user(data, tmp_path):
    with user(data, tmp_path) as builder, user(data, tmp_path) as other:
        assert builder.lines
        assert (other.path, other.lines) == (builder.path, [])
        builder.process.communicate("\n", timeout=60)
        assert other.path.exists()
    assert (builder.process.returncode, other.process.returncode) == (0, 0)
    assert list(other.path.parent.iterdir()) == []


def test_the_end_is_quiet_where_the_folder_of_the_cache_is_gone(data, tmp_path):
    with user(data, tmp_path) as process:
        shutil.rmtree(process.path.parent)
        output, _ = process.process.communicate("\n", timeout=60)
    assert (process.process.returncode, output) == (0, "")


def test_what_a_killed_run_left_in_memory_is_used_or_removed(data, tmp_path):
    with user(data, tmp_path) as killed:
        killed.process.kill()
        killed.process.wait()
    assert killed.path.exists()
    with user(data, tmp_path) as heir:
        assert (heir.path, heir.lines) == (killed.path, [])
        heir.process.kill()
        heir.process.wait()
    with user(data, tmp_path, subsets=1) as other:
        assert other.path.exists()
        assert not killed.path.exists()
