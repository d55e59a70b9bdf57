"""The cache of decoded training images, `data.cache`: in shared memory or on disk.

One file holds all images. The first process builds it under a lock that ends with the process; all others
wait. The file is written under a temporary name and renamed. Every process verifies its checksums. Folder and
file are their user's alone: a process opens no file that somebody else may have written.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from prcl_fast.config import DataConfig
from prcl_fast.data.cache.file import VERSION, DamagedFileError, ImageFile, write_images
from prcl_fast.data.cache.locks import locked, others, remove_unused, use_until_exit
from prcl_fast.data.decode import decode
from prcl_fast.data.source import Source
from prcl_fast.errors import InputError, WriteError
from prcl_fast.files.folders import make_private_folder
from prcl_fast.files.writing import remove_leftovers, replacing, user_cache
from prcl_fast.machine.description import usable_cores
from prcl_fast.machine.memory import available_memory

_SHARED_MEMORY = Path("/dev/shm")
_SAMPLE = 8  # images of each subset that are decoded to estimate the room needed
_SECONDS_BETWEEN_LINES = 10.0
_KEPT_DAYS = 30  # for a file on disk that nobody opens

_log = logging.getLogger(__name__)

_Item = tuple[str, bool]  # name of an image, and whether its label is stored with it
Say = Callable[[str], None]


class ImageCache:
    """The decoded images of some subsets, by position in their splits. Can be sent to worker processes."""

    def __init__(self, file: ImageFile, first: dict[str, int]) -> None:
        self._file, self._first = file, first

    @property
    def path(self) -> Path:
        """The file."""
        return self._file.path

    def image(self, subset: str, index: int) -> np.ndarray:
        """Image number `index` of a subset as `decode` returns it, uint8 [H, W, 4], read-only.

        Raises:
            InputError: the file was removed before this process first opened it.
        """
        try:
            return self._file[self._first[subset] + index]
        except (OSError, DamagedFileError) as error:
            raise InputError(f"data.cache: {self.path} cannot be opened any more: {error}") from None


def open_cache(
    source: Source, data: DataConfig, subsets: Sequence[str], say: Say | None = None
) -> ImageCache:
    """The cache of `data.cache` (ram or disk), built if it is missing or damaged.

    The name of its file is a hash of the state of all images (`Source.pixel_state`). A cache in memory is
    removed with its last user. One that a killed process left is reused, or removed when another is built.

    Args:
        subsets: names of the splits, such as ("labeled", "unlabeled"); labels are stored for "labeled".
        say: receives lines about the progress of building.

    Raises:
        InputError: an image that cannot be read, or, naming data.cache, not enough room or no access.
    """
    say = say or _log.info
    first: dict[str, int] = {}
    items: list[_Item] = []
    for subset in subsets:
        first[subset] = len(items)
        items += [(name, subset == "labeled") for name in source.splits[subset].names]
    path = _folder(data) / f"{_key(source, items)}.images"
    try:
        make_private_folder(path.parent)
        return ImageCache(_opened_or_built(source, items, path, data.cache, say), first)
    except WriteError as error:
        raise InputError(f"data.cache: {error}") from None
    except OSError as error:
        raise InputError(f"data.cache: {error.filename or path}: {error.strerror}") from None


def _opened_or_built(source: Source, items: Sequence[_Item], path: Path, kind: str, say: Say) -> ImageFile:
    def opened(damage: Say | None) -> ImageFile | None:
        file = _intact(path, [labeled for _, labeled in items], len(source.classes), damage)
        if file is not None:
            use_until_exit(path, remove=kind == "ram")
        return file

    lock = path.with_suffix(".lock")
    # Shared at first, so that the processes of a job verify the checksums in parallel.
    with locked(lock, say, shared=True):
        file = opened(None)
    if file is None:
        with locked(lock, say):
            file = opened(_log.warning)
            if file is None:
                _build(source, items, path, kind, say)
                file = ImageFile(path)
                use_until_exit(path, remove=kind == "ram")
    return file


def _intact(path: Path, labeled: Sequence[bool], classes: int, damage: Say | None) -> ImageFile | None:
    file = ImageFile(path)
    try:
        if len(file) != len(labeled):
            raise DamagedFileError(f"{path}: {len(file)} images instead of {len(labeled)}")
        file.verify(labeled, classes, _threads())
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        if damage is not None:
            damage(f"{error}; it is built again")
        return None
    return file


def _folder(data: DataConfig) -> Path:
    if data.cache == "ram":
        if not _SHARED_MEMORY.is_dir():
            raise InputError(f"data.cache: ram needs {_SHARED_MEMORY}, which this machine does not have")
        return _SHARED_MEMORY / f"prcl_fast-{os.geteuid()}"
    if data.cache_dir is not None:  # which several users may share
        return data.cache_dir / f"prcl_fast-{os.geteuid()}"
    home = user_cache()
    if home is None:
        raise InputError("data.cache_dir: needed, because this user has no home folder (set HOME)")
    return home / "images"


def _key(source: Source, items: Sequence[_Item]) -> str:
    digest = hashlib.sha256(f"{VERSION}\n".encode())
    for name, labeled in items:
        digest.update(f"{labeled} {source.pixel_state(name, labeled)}\n".encode())
    return digest.hexdigest()[:24]


def _build(source: Source, items: Sequence[_Item], path: Path, kind: str, say: Say) -> None:
    folder = path.parent
    path.unlink(missing_ok=True)
    remove_leftovers(folder, path.name)
    for other in others(path, unused_s=0 if kind == "ram" else _KEPT_DAYS * 86400):
        if remove_unused(other, wait=False) and kind == "disk":
            say(f"data.cache: removed {other}, which was not used for {_KEPT_DAYS} days")
    needed, free = _room_needed(source, items), _room(folder, kind)
    if needed > free:
        raise InputError(
            f"data.cache: {kind} needs about {_size(needed)} for {len(items)} decoded images, but "
            f"{folder} has {_size(free)} free"
        )
    started = time.monotonic()
    say(f"data.cache: decoding {len(items)} images into {path}, about {_size(needed)}")
    try:
        with (
            replacing(path, private=True) as file,
            contextlib.closing(_decoded(source, items, say)) as images,
        ):
            length = write_images(file, images)
    except WriteError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"data.cache: {folder} ran full before all {len(items)} images were decoded "
            f"(about {_size(needed)})"
        ) from None
    say(f"data.cache: {_size(length)} in {time.monotonic() - started:.1f} s")


def _decoded(source: Source, items: Sequence[_Item], say: Say) -> Generator[np.ndarray, None, None]:
    """The images in order; several threads decode ahead."""
    threads = _threads()
    waiting: deque[Future[np.ndarray]] = deque()
    last_line = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for submitted, (name, labeled) in enumerate(items, start=1):
                waiting.append(pool.submit(decode, source, name, labeled))
                if len(waiting) == 2 * threads:
                    yield waiting.popleft().result()
                if time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
                    last_line = time.monotonic()
                    say(f"data.cache: {submitted - len(waiting)} of {len(items)} images decoded")
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _room_needed(source: Source, items: Sequence[_Item]) -> int:
    """Estimated bytes of all images, from the mean size of a few of each subset."""
    needed = 0.0
    for labeled in (True, False):
        names = [name for name, has_label in items if has_label == labeled]
        sample = names[:: max(1, len(names) // _SAMPLE)][:_SAMPLE]
        if sample:
            needed += len(names) * float(np.mean([decode(source, name, labeled).nbytes for name in sample]))
    return int(needed)


def _room(folder: Path, kind: str) -> int:
    free = shutil.disk_usage(folder).free
    # The shared-memory file system may be larger than the available memory.
    available = available_memory() if kind == "ram" else None
    return free if available is None else min(free, available)


def _threads() -> int:
    return min(16, usable_cores())


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
