"""The runner of a check: phases with time limits, archived after each.

A phase is a command with its own log. When its time limit or the set's runs out, it is killed with all its
children, and the next phase starts. If the runner itself is killed, an archive of finished phases remains.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu.table import notes, table
from prcl_fast.files.writing import open_append, replacing, write_text

KIND = "prcl gpu check 1"
PASSED, FAILED, CUT_OFF, SKIPPED, NO_TIME = "passed", "failed", "cut off", "skipped", "no time was left"
NO_GPU = "no GPU"
SECONDS = 350.0  # of a set: under six minutes with start and end
SECONDS_WITHOUT_GPU = 170.0
_LEAST = 5.0  # seconds without which a phase does not start
_GRACE = 3.0  # seconds between SIGTERM and SIGKILL
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Phase:
    """One command.

    Attributes:
        name: of its log and, as NAME.json, of its result.
        limit: its time limit in seconds.
        command: runs in the root of the sources.
        verifies: what the phase verifies.
        skipped: why it is skipped, or None.
        environment: additional variables.
        lines: number of last lines of its log to print.
        expects: text that its log must contain; tests that are all skipped also end with status 0.
    """

    name: str
    limit: float
    command: Sequence[str]
    verifies: str
    skipped: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    lines: int = 4
    expects: str = ""


@dataclass(frozen=True)
class Outcome:
    """The end of a phase: `status` is one of the five above, `detail` explains it, `notes` hold numbers."""

    name: str
    status: str
    limit: float
    seconds: float
    verifies: str
    detail: str = ""
    notes: Sequence[str] = ()


def run_set(
    name: str,
    facts_phase: Callable[[Path], Phase],
    phases: Callable[[Path, dict[str, Any]], Sequence[Phase]],
    work: Path,
    out: Path,
    seconds: float = SECONDS,
) -> int:
    """Runs a set into out/NAME.tar.gz and prints its table.

    Args:
        facts_phase: (folder of the results) -> the first phase, which writes facts.json there.
        phases: (folder of the results, content of facts.json) -> the other phases.
        work: a temporary folder.
        out: the folder of the archive.
        seconds: limit of all phases together.

    Returns:
        0 if no phase failed or was cut off; else 1.
    """
    begun = time.monotonic()
    folder = work / name
    folder.mkdir()
    outcomes: list[Outcome] = []
    facts: dict[str, Any] = {}
    end = begun + seconds

    def run(phase: Phase) -> None:
        try:
            outcomes.append(run_phase(phase, folder, work / "tmp", end - time.monotonic()))
        finally:
            # Also when the runner itself is terminated.
            _write_summary(name, outcomes, facts, time.monotonic() - begun, folder)
            pack(folder, out / f"{name}.tar.gz")
        _show(phase, outcomes[-1], folder, time.monotonic() - begun)

    run(facts_phase(folder))
    path = folder / "facts.json"
    if path.is_file():
        facts.update(json.loads(path.read_text()))
    without = facts.get("gpu", "") is None
    if without:
        end = begun + min(seconds, SECONDS_WITHOUT_GPU)
    for phase in phases(folder, facts):
        run(phase)
    print(*table(name, outcomes), sep="\n")
    bad = [x.name for x in outcomes if x.status in (FAILED, CUT_OFF)]
    late = [x.name for x in outcomes if x.status == NO_TIME]
    summary = [f"failed or cut off: {', '.join(bad)}" if bad else "nothing failed"]
    summary += [f"no time was left for {', '.join(late)}"] if late else []
    summary += [NO_GPU] if without else []
    print(f"{name}: {'; '.join(summary)}", flush=True)
    return 1 if bad else 0


def run_phase(phase: Phase, folder: Path, temporary: Path, seconds_left: float) -> Outcome:
    """Runs a phase into folder/NAME.log, and kills it with all its children when its time is over.

    Args:
        temporary: its folder for temporary files, removed afterwards.
    """

    def outcome(status: str, seconds: float = 0.0, detail: str = "") -> Outcome:
        numbers = notes(folder, phase.name) if status != SKIPPED else []
        return Outcome(phase.name, status, phase.limit, round(seconds, 1), phase.verifies, detail, numbers)

    if phase.skipped is not None:
        return outcome(SKIPPED, detail=phase.skipped)
    limit = min(phase.limit, seconds_left)
    if limit < min(_LEAST, phase.limit):
        return outcome(NO_TIME)
    temporary.mkdir(exist_ok=True)
    begun = time.monotonic()
    code = None
    path = folder / f"{phase.name}.log"
    path.unlink(missing_ok=True)
    with open_append(path) as log:
        try:
            process = subprocess.Popen(
                phase.command,
                cwd=_ROOT,
                env=os.environ | {"TMPDIR": str(temporary)} | phase.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return outcome(FAILED, detail=f"{phase.command[0]}: {error.strerror or error}")
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
        finally:
            # Processes left behind would slow down the next phase.
            _signal(process, signal.SIGKILL)
            process.wait()
            shutil.rmtree(temporary, ignore_errors=True)
    seconds = time.monotonic() - begun
    if code is None:
        why = "its time limit" if limit == phase.limit else "the set's time limit"
        return outcome(CUT_OFF, seconds, f"{why} ran out after {limit:.0f} s")
    if code != 0:
        return outcome(FAILED, seconds, f"exit status {code}")
    if phase.expects not in path.read_text(errors="replace"):
        return outcome(FAILED, seconds, f"its log does not contain {phase.expects.strip()!r}")
    return outcome(PASSED, seconds)


def pack(folder: Path, archive: Path) -> None:
    """Packs the files of a folder, replacing the archive atomically."""
    with replacing(archive) as file, tarfile.open(fileobj=file, mode="w:gz", compresslevel=6) as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)


def _write_summary(
    name: str, outcomes: Sequence[Outcome], facts: Mapping[str, Any], seconds: float, folder: Path
) -> None:
    summary = {
        "kind": KIND,
        "set": name,
        "commit": facts.get("machine", {}).get("commit") or os.environ.get("PRCL_COMMIT"),
        "gpu": facts.get("gpu"),
        "seconds": round(seconds, 1),
        "phases": [asdict(outcome) for outcome in outcomes],
        "facts": facts,
    }
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")


def _show(phase: Phase, outcome: Outcome, folder: Path, at: float) -> None:
    """Prints one line and the end of the log."""
    detail = f" ({outcome.detail})" if outcome.detail else ""
    print(f"== {outcome.name}: {outcome.status}{detail}, {outcome.seconds:.0f} s; at {at:.0f} s", flush=True)
    log = folder / f"{phase.name}.log"
    if outcome.status != SKIPPED and log.is_file():
        lines = log.read_text(errors="replace").splitlines()
        print(*(f"   {line[:140]}" for line in lines[-phase.lines :]), sep="\n", flush=True)


def _signal(process: subprocess.Popen[Any], number: signal.Signals) -> None:
    """Signals the phase's process group, which may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
