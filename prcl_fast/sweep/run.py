"""The runs of a sweep as processes: each is `prcl train`, on one GPU or one share of the cores."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from prcl_fast.config import dump_config
from prcl_fast.config.files import PATH_KEYS
from prcl_fast.data.sources import build_source
from prcl_fast.data.tools.label_check import check_labels
from prcl_fast.device import choose_device
from prcl_fast.errors import InputError
from prcl_fast.files.locking import INHERITED, FolderLock
from prcl_fast.files.reading import read_bytes
from prcl_fast.files.writing import make_folder, open_append, write_text
from prcl_fast.machine.description import usable_cores
from prcl_fast.runs.folder import label_scan_cache
from prcl_fast.sweep.config import Sweep, SweepRun

LOG, CONFIGURATION = "train.log", "train.yaml"
_TAIL = 1 << 14  # bytes read from the end of train.log
_LONGEST = 1 << 50  # bytes of train.log
_PAUSE = 0.2  # seconds between two polls of the processes
# Variables of torchrun and srun, with which a run would wait for other ranks.
_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_STEP_ID")


@dataclass(frozen=True)
class Started:
    """A run's process was started."""

    run: SweepRun


@dataclass(frozen=True)
class Ended:
    """A run's process ended, or could not start.

    Attributes:
        failure: why it failed; None if it finished or was stopped.
    """

    run: SweepRun
    failure: str | None


@dataclass(frozen=True)
class Working:
    """These runs are in progress; sent at every poll."""

    runs: tuple[SweepRun, ...]


def check_output(sweep: Sweep) -> None:
    """Raises InputError if a run of the sweep would lie inside the folder of another run."""
    for above in sorted({above for run in sweep.runs for above in run.config.output.absolute().parents}):
        if (above / "metrics.jsonl").exists():
            raise InputError(f"output: {sweep.output} would put runs inside the run folder {above}")


def check_files(runs: Sequence[SweepRun]) -> None:
    """Raises InputError if a file of a run's data or weights is missing, before the first run starts."""
    for run in runs:
        for section, key in PATH_KEYS:
            path = getattr(getattr(run.config, section), key)
            if isinstance(path, Path) and key != "cache_dir" and not path.exists():
                raise InputError(f"run {run.name}: {section}.{key}: no such file or folder: {path}")


def check_label_files(runs: Sequence[SweepRun]) -> list[str]:
    """Checks the labels of every data set of the runs as `prcl train` does; returns the notes on them.

    Raises:
        InputError: naming the run whose data set `prcl train` would refuse.
    """
    notes: dict[str, None] = {}
    data_sets: dict[str, SweepRun] = {}
    for run in runs:
        if run.config.data.scan:
            data_sets.setdefault(run.config.data.model_dump_json(), run)
    for run in data_sets.values():
        try:
            notes |= dict.fromkeys(check_labels(build_source(run.config.data), cache=label_scan_cache()))
        except InputError as error:
            raise InputError(f"run {run.name}: {error}") from None
    return list(notes)


def places(runs: Sequence[SweepRun], jobs: int | None, environ: Mapping[str, str]) -> list[dict[str, str]]:
    """The places of parallel runs, each the environment variables of its processes.

    With CUDA there is one place for each GPU, else `jobs` places (1 by default) that share the cores.

    Raises:
        InputError: no such device, or more `jobs` than GPUs.
    """
    names = {run.config.train.device for run in runs}
    indexed = sorted(name for name in names if name.startswith("cuda:"))
    if indexed:
        raise InputError(f"train.device: {indexed[0]}: a sweep assigns one GPU to each run; use cuda")
    if any(choose_device(name).type == "cuda" for name in names):
        gpus = gpu_names(environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count())
        if jobs is not None and jobs > len(gpus):
            raise InputError(f"--jobs: {jobs}, but {len(gpus)} GPUs are visible, one for each run")
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:jobs]]
    if jobs is None or jobs == 1:
        return [{}]
    threads = str(max(1, usable_cores() // jobs))
    return [{"OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS", threads)}] * jobs


def gpu_names(visible: str | None, count: int) -> list[str]:
    """The names of the `count` GPUs of this process in CUDA_VISIBLE_DEVICES, whose value is `visible`."""
    if visible is None:
        return [str(index) for index in range(count)]
    return [name.strip() for name in visible.split(",")][:count]


def train_runs(
    runs: Sequence[SweepRun], where: Sequence[Mapping[str, str]]
) -> Generator[Started | Ended | Working, None, None]:
    """Trains `runs`, one on each place of `where` at a time, and yields their events.

    Into a run's folder go its whole configuration, train.yaml, and its output, train.log. SIGINT and SIGTERM
    are passed on to the processes: they save and end, no further run starts, and the generator ends. It must
    run in the main thread, and must be closed, which stops the runs in progress.
    """
    waiting, free = deque(runs), list(where)
    working: list[_Process] = []
    with _signals() as asked:
        try:
            while waiting or working:
                while waiting and free and not asked:
                    run = waiting.popleft()
                    try:
                        process = _Process(run, free[-1])
                    except (OSError, InputError) as error:
                        yield Ended(run, _cannot_start(run, error))
                        continue
                    free.pop()
                    working.append(process)
                    yield Started(run)
                if asked:
                    waiting.clear()
                for process in working:
                    process.pass_on(asked)
                for process in [process for process in working if process.ended()]:
                    working.remove(process)
                    free.append(process.place)
                    yield Ended(process.run, process.failure(stopped=bool(asked)))
                if working:
                    yield Working(tuple(process.run for process in working))
                    time.sleep(_PAUSE)
        finally:
            for process in working:
                process.ask_to_stop()
            for process in working:
                process.wait()


class _Process:
    """A run's process.

    Raises:
        InputError: another process trains the run, or its folder cannot be written.
        OSError: the process cannot be started.
    """

    def __init__(self, run: SweepRun, place: Mapping[str, str]) -> None:
        self.run, self.place = run, dict(place)
        folder = run.config.output
        self._log = folder / LOG
        make_folder(folder, "output")
        self._lock = FolderLock(folder, "output")
        try:
            with open_append(self._log) as log:
                self._start = log.seek(0, os.SEEK_END)
                write_text(folder / CONFIGURATION, yaml.safe_dump(dump_config(run.config), sort_keys=False))
                self._process = self._train(folder / CONFIGURATION, log)
        except BaseException:
            self._lock.release()
            raise
        self._passed = 0

    def _train(self, configuration: Path, log: io.FileIO) -> subprocess.Popen[bytes]:
        environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHERS}
        # The process takes the lock over, and keeps it if this one is killed.
        lock = self._lock.descriptor
        inherited = {} if lock is None else {INHERITED: str(lock)}
        # A new session: a terminal sends Ctrl-C to its whole process group, and a second one would end the
        # run immediately.
        return subprocess.Popen(
            [sys.executable, "-m", "prcl_fast.cli.main", "train", str(configuration)],
            env=environment | self.place | inherited,
            pass_fds=() if lock is None else (lock,),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def pass_on(self, signals: Sequence[int]) -> None:
        """Sends those of `signals` that were not yet sent."""
        for number in signals[self._passed :]:
            self._process.send_signal(number)
        self._passed = len(signals)

    def ended(self) -> bool:
        if self._process.poll() is None:
            return False
        self._lock.release()
        return True

    def ask_to_stop(self) -> None:
        """Asks the process to save and end."""
        self._process.terminate()

    def wait(self) -> None:
        """Waits for the end of the process."""
        self._process.wait()
        self._lock.release()

    def failure(self, *, stopped: bool) -> str | None:
        """The last line of an ended process's log; None if it succeeded or was `stopped`."""
        status = self._process.returncode
        if status == 0 or stopped:
            return None
        try:
            tail = read_bytes(self._log, "log", _LONGEST, after=self._start, tail=_TAIL)
        except InputError as error:
            return str(error)
        lines = [line for line in tail.decode(errors="replace").splitlines() if line.strip()]
        last = lines[-1].strip().removeprefix("prcl: ") if lines else "its log is empty"
        return last if status > 0 else f"ended by {signal.Signals(-status).name}; {last}"


def _cannot_start(run: SweepRun, error: OSError | InputError) -> str:
    if isinstance(error, InputError):
        return str(error)
    return f"{error.filename or run.config.output}: {error.strerror or error}"


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the numbers of received SIGINT and SIGTERM."""
    heard: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    former = {number: signal.signal(number, lambda number, frame: heard.append(number)) for number in numbers}
    try:
        yield heard
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
