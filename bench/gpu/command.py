"""The check on a machine with a GPU: two sets of phases of under six minutes each, the most important first.

    python -m bench gpu first second [--out DIR]
    python -m bench gpu unpack ARCHIVE [--into bench/results]

Needs a Python with PyTorch, and no network. In a bundle of `make gpu-bundle`, gpu_check.sh is the same
command. A set writes one archive, DIR/SET.tar.gz, after every phase: logs, JSON, junit XML, summary.json.
Without a GPU the phases that have a small form run on the CPU, and the last line is "no GPU". Exit status 1:
a phase failed or was cut off. `unpack` puts the JSON of an archive into bench/results, as gpu_NAME.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.arguments import parser
from bench.gpu.phases import SETS, facts_phase
from bench.gpu.runner import KIND, run_set
from bench.gpu.wheels import unpack_missing
from prcl_fast.errors import InputError
from prcl_fast.files.writing import write_text

_ROOT = Path(__file__).resolve().parents[2]
_WHEELS = _ROOT / "wheels"  # of a bundle
_CUDA = Path("/usr/local/cuda")
_LARGEST = 64 << 20  # bytes of a JSON file in an archive


def main(arguments: Sequence[str]) -> int:
    """`python -m bench gpu`."""
    if arguments[:1] == ["unpack"]:
        return _unpack(arguments[1:])
    command = parser("gpu", __doc__)
    command.add_argument("sets", nargs="+", choices=tuple(SETS), metavar="SET", help=" or ".join(SETS))
    command.add_argument(
        "--out",
        type=Path,
        default=os.environ.get("OUT") or _ROOT / "bench" / "results" / "local" / "gpu_check",
        help="folder of the archives; by default $OUT, or bench/results/local/gpu_check",
    )
    options = command.parse_args(arguments)
    # An exit, unlike the signal's default, ends the running phase and packs its files.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    status = 0
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        work = Path(folder)
        _set_environment(work / "site")
        for name in options.sets:
            status |= run_set(name, facts_phase, SETS[name], work, out)
            print(out / f"{name}.tar.gz", flush=True)
    return status


def results_of(archive: Path) -> dict[str, str]:
    """The JSON results in an archive of a set, by their names in bench/results.

    Raises:
        InputError: the file is not such an archive, or was made without a GPU.
    """
    found = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and member.name.endswith(".json") and "/" not in member.name:
                    if member.size > _LARGEST:
                        raise InputError(f"{archive}: {member.name} has {member.size} bytes")
                    file = tar.extractfile(member)
                    found[member.name] = file.read().decode() if file else ""
        contents = {name: json.loads(text) for name, text in found.items()}
    except (OSError, tarfile.TarError, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{archive}: {error}") from None
    summary = contents.get("summary.json")
    if not isinstance(summary, dict) or summary.get("kind") != KIND or summary.get("set") not in SETS:
        raise InputError(f"{archive}: holds no summary of a GPU check")
    if not summary.get("gpu"):
        raise InputError(f"{archive}: was made without a GPU")
    # The summary holds the facts.
    names = {"summary.json": f"gpu_{summary['set']}.json"}
    return {names.get(name, f"gpu_{name}"): text for name, text in found.items() if name != "facts.json"}


def _unpack(words: Sequence[str]) -> int:
    command = parser("gpu unpack", "Puts the JSON results of an archive into a folder, as gpu_NAME.json.")
    command.add_argument("archive", type=Path)
    command.add_argument("--into", type=Path, default=_ROOT / "bench" / "results")
    options = command.parse_args(words)
    results = results_of(options.archive)
    for name, text in results.items():
        write_text(options.into / name, text)
        print(options.into / name)
    return 0


def _set_environment(site: Path) -> None:
    """Sets the environment of all phases: sources, bundled packages, CUDA's tools and the commit."""
    environment = os.environ
    paths = [str(_ROOT)]
    if _WHEELS.is_dir():
        unpacked = unpack_missing(_WHEELS, site)
        print(f"unpacked wheels: {', '.join(unpacked) or 'none; all packages are installed'}", flush=True)
        paths.insert(0, str(site))
    environment["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [environment.get("PYTHONPATH")])])
    if _CUDA.is_dir():
        home = environment.setdefault("CUDA_HOME", str(_CUDA))
        environment["PATH"] = os.pathsep.join([f"{home}/bin", environment.get("PATH", os.defpath)])
    environment |= {
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "MPLBACKEND": "Agg",
        "COLUMNS": "140",
    }
    commit = _ROOT / "COMMIT"
    if commit.is_file():
        environment.setdefault("PRCL_COMMIT", commit.read_text().strip())
