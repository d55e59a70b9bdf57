"""Links and pipes in a run's folder: nothing is written through them, and no process waits for them."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from prcl_fast.config import Config
from prcl_fast.errors import RunError
from prcl_fast.runs.checkpoint import save_checkpoint, save_last
from prcl_fast.runs.folder import claim_output, store_config
from prcl_fast.runs.log import RunLog
from support.run_folders import iterations, small_state

pytestmark = pytest.mark.timeout(60)  # the other end of a pipe never comes


def open_log(folder: Path, start: int = 0) -> RunLog:
    return RunLog(folder, start=start, total=10, console=Console(quiet=True))


def write_config(config: Config) -> None:
    claim_output(config)
    store_config(config)


def write_last(config: Config) -> None:
    save_last(config.output, small_state(1), keep=2)


def write_best(config: Config) -> None:
    save_checkpoint(config.output / "best.pt", small_state(1))


def write_record(config: Config) -> None:
    with open_log(config.output) as log:
        log.train(2, {"loss": 1.0})


WRITERS = {
    "config.yaml": write_config,
    "last.pt": write_last,
    "best.pt": write_best,
    "metrics.jsonl": write_record,
}


@pytest.mark.parametrize("suffix", ["", ".tmp"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_link_is_replaced_and_its_target_is_left_alone(
    tmp_path: Path, tiny: Config, name: str, suffix: str
) -> None:
    tiny.output.mkdir()
    victim = tmp_path / "victim"
    if name == "config.yaml" and not suffix:
        write_config(tiny)
        shutil.move(tiny.output / name, victim)
    else:
        victim.write_text("precious")
    before = victim.read_bytes()
    (tiny.output / (name + suffix)).symlink_to(victim)
    WRITERS[name](tiny)
    assert victim.read_bytes() == before
    assert not (tiny.output / name).is_symlink()
    assert (tiny.output / name).stat().st_size > 0


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "config.yaml"])
def test_a_pipe_is_replaced(tiny: Config, name: str) -> None:
    tiny.output.mkdir()
    os.mkfifo(tiny.output / name)
    os.mkfifo(tiny.output / f"{name}.tmp")
    WRITERS[name](tiny)
    assert (tiny.output / name).is_file()


@pytest.mark.parametrize(
    ("make", "kind"),
    [(lambda path: path.symlink_to(path.parent / "victim"), "a link"), (os.mkfifo, "a pipe")],
    ids=["link", "pipe"],
)
def test_metrics_that_became_a_link_or_a_pipe_end_the_run(
    tmp_path: Path, make: Callable[[Path], None], kind: str
) -> None:
    (tmp_path / "victim").write_text("precious")
    with open_log(tmp_path) as log:
        log.train(2, {"loss": 1.0})
        (tmp_path / "metrics.jsonl").unlink()
        make(tmp_path / "metrics.jsonl")
        with pytest.raises(RunError, match=rf"metrics\.jsonl: cannot be written: it is {kind}$"):
            log.train(4, {"loss": 1.0})
        with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written: "):
            log.flush()
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_run_that_goes_on_reads_no_metrics_from_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be read as a metrics file: it is a pipe"):
        open_log(tmp_path, start=2)


def test_what_a_killed_process_left_goes_with_the_next_start(tiny: Config) -> None:
    write_config(tiny)
    shutil.copy(tiny.output / "config.yaml", tiny.output / "my.tmp")
    child = os.fork()
    if not child:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        save_last(tiny.output, small_state(1), keep=2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list(tiny.output.iterdir())) == 3
    claim_output(tiny)
    assert sorted(path.name for path in tiny.output.iterdir()) == ["config.yaml", "my.tmp"]
    save_last(tiny.output, small_state(2), keep=2)
    assert iterations(tiny.output) == {"last.pt": 2}
