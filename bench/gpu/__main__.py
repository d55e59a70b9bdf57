"""The check on a machine with a GPU: two sets of phases of under six minutes each, the most telling first.

    python -m bench.gpu first second [--out DIR]
    python -m bench.gpu unpack ARCHIVE [--into bench/results]

Needs a Python with PyTorch, and no network; in a file of `make gpu-bundle`, gpu_check.sh is the same command.
A set leaves one archive, DIR/SET.tar.gz, packed anew after every phase: logs, JSON, junit XML, summary.json.
Without a GPU the phases that have a small form run on the CPU, and the last line says "no GPU". Exit status
1: a phase failed or was cut off. `unpack` puts the JSON of an archive into bench/results, as gpu_NAME.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.phases import SETS, facts_phase
from bench.gpu.runner import KIND, run_set
from bench.gpu.wheels import unpack_missing
from prcl_fast.files.writing import write_text

_ROOT = Path(__file__).resolve().parents[2]
_WHEELS = _ROOT / "wheels"  # of a bundle
_CUDA = Path("/usr/local/cuda")
_LARGEST = 64 << 20  # bytes of a JSON file in an archive


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["unpack"]:
        return _unpack(words[1:])
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sets", nargs="+", choices=tuple(SETS), metavar="SET", help=" or ".join(SETS))
    parser.add_argument(
        "--out",
        type=Path,
        default=os.environ.get("OUT") or _ROOT / "bench" / "results" / "local" / "gpu_check",
        help="folder of the archives; by default $OUT, or bench/results/local/gpu_check",
    )
    options = parser.parse_args(words)
    # An exit, unlike the signal's default, ends the phase that runs and packs what it left.
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
    """The JSON results in an archive of a set, by the name that each gets among the results.

    Raises:
        ValueError: it is no such archive, or was made without a GPU.
    """
    found = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and member.name.endswith(".json") and "/" not in member.name:
                    if member.size > _LARGEST:
                        raise ValueError(f"{archive}: {member.name} has {member.size} bytes")
                    file = tar.extractfile(member)
                    found[member.name] = file.read().decode() if file else ""
        contents = {name: json.loads(text) for name, text in found.items()}
    except (OSError, tarfile.TarError, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{archive}: {error}") from None
    summary = contents.get("summary.json")
    if not isinstance(summary, dict) or summary.get("kind") != KIND or summary.get("set") not in SETS:
        raise ValueError(f"{archive}: holds no summary of a GPU check")
    if not summary.get("gpu"):
        raise ValueError(f"{archive}: was made without a GPU")
    # The summary holds the facts.
    names = {"summary.json": f"gpu_{summary['set']}.json"}
    return {names.get(name, f"gpu_{name}"): text for name, text in found.items() if name != "facts.json"}


def _unpack(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check unpack")
    parser.add_argument("archive", type=Path)
    parser.add_argument("--into", type=Path, default=_ROOT / "bench" / "results")
    options = parser.parse_args(words)
    try:
        results = results_of(options.archive)
    except ValueError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    for name, text in results.items():
        write_text(options.into / name, text)
        print(options.into / name)
    return 0


def _set_environment(site: Path) -> None:
    """What all phases share: the sources, the carried packages, CUDA's tools and the commit."""
    environment = os.environ
    paths = [str(_ROOT)]
    if _WHEELS.is_dir():
        unpacked = unpack_missing(_WHEELS, site)
        print(f"unpacked here: {', '.join(unpacked) or 'nothing; all packages are there'}", flush=True)
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


if __name__ == "__main__":
    sys.exit(main())
