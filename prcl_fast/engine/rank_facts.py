"""Facts of a command that must be equal on all ranks: settings, data, files of weights, arguments."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from prcl_fast.config import PROCESS_KEYS, Config, flat_config
from prcl_fast.config.files import plain_path
from prcl_fast.data.identity import data_identity
from prcl_fast.data.source import Source
from prcl_fast.engine.predict_inputs import InputImage
from prcl_fast.errors import naming
from prcl_fast.files.reading import file_digest
from prcl_fast.processes.agreement import check_same
from prcl_fast.processes.collectives import world_size
from prcl_fast.runs.checkpoint import LoadedRun, find_checkpoint


def check_same_settings(config: Config, options: Mapping[str, bool]) -> None:
    """Compares the options of the command, and all keys but `PROCESS_KEYS`.

    A collective. Raises DifferenceError on every rank.
    """
    check_same({**options, **flat_config(config, PROCESS_KEYS)})


def check_same_weights(config: Config, prototypes_from: LoadedRun | None) -> None:
    """Compares the files that a new run begins with, of `model.weights` and `method.prototypes_from`.

    A collective.

    Args:
        prototypes_from: the run of `method.prototypes_from`, if it is used.

    Raises:
        DifferenceError: on every rank.
        InputError: a file cannot be read.
    """
    if world_size() == 1:
        return
    weights, content = config.model.weights, "null"
    if weights is not None:
        with naming("model.weights"):
            content = _content(find_checkpoint(weights), "weights file")
    prototypes = "null" if prototypes_from is None else _checkpoint(prototypes_from)
    check_same({"model.weights": content, "method.prototypes_from": prototypes})


def check_same_evaluation(run: LoadedRun, config: Config, source: Source, subset: str) -> None:
    """Compares what `prcl eval` evaluates.

    A collective.

    Args:
        config: that of the run, with the overrides.

    Raises:
        DifferenceError: on every rank.
        InputError: a file cannot be read.
    """
    if world_size() == 1:
        return
    check_same(
        {
            "--subset": subset,
            "checkpoint": _checkpoint(run),
            **flat_config(config, PROCESS_KEYS),
            **data_identity(source),
        }
    )


def check_same_prediction(
    run: LoadedRun, network: str, images: Sequence[InputImage], out: Path, *, raw: bool
) -> None:
    """Compares what `prcl predict` predicts, of which each rank takes a part.

    A collective.

    Raises:
        DifferenceError: on every rank.
        InputError: a file cannot be read.
    """
    if world_size() == 1:
        return
    names = "\n".join(f"{image.place} {image.path.stat().st_size}" for image in images)
    check_same(
        {
            "--network": network,
            "--raw": raw,
            "--out": str(plain_path(out)),
            "checkpoint": _checkpoint(run),
            **flat_config(run.config, PROCESS_KEYS),
            "images": f"{len(images)}, list {hashlib.sha256(names.encode()).hexdigest()[:12]}",
        }
    )


def check_same_checkpoint(path: Path) -> None:
    """Compares the content of the checkpoint from which a run goes on.

    A collective.

    Raises:
        DifferenceError: on every rank.
        InputError: it cannot be read.
    """
    if world_size() > 1:
        check_same({f"output {path.name}": _content(path, "checkpoint")})


def _checkpoint(run: LoadedRun) -> str:
    return f"of iteration {run.iteration}, {_content(run.path, 'checkpoint')}"


def _content(path: Path, what: str) -> str:
    return f"content {file_digest(path, what)}"
