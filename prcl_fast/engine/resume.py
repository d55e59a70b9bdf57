"""Resume of a run: its newest checkpoint, compared with the configuration and the data, then loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prcl_fast.config import Config, parse_stored_config
from prcl_fast.data.identity import changed_data
from prcl_fast.engine.progress import Progress, newest_state
from prcl_fast.engine.step import TrainStep
from prcl_fast.errors import InputError
from prcl_fast.methods import Method
from prcl_fast.runs.checkpoint import restore
from prcl_fast.runs.checkpoint_file import check_optimizer
from prcl_fast.runs.folder import check_same_run


@dataclass(frozen=True)
class AllowedChanges:
    """Changes with which a run may go on.

    Attributes:
        extend: more `train.iterations`.
        data: other lists and files of the data set, of the same classes.
    """

    extend: bool = False
    data: bool = False


NO_CHANGES = AllowedChanges()


@dataclass(frozen=True)
class Before:
    """The part of a run that is done.

    Attributes:
        iteration: optimiser steps done.
        progress: training time and evaluations so far.
        total: `train.iterations` of these steps; for a new run, those of its configuration.
        starts: a provenance record of each command that has trained the run.
    """

    iteration: int
    progress: Progress
    total: int
    starts: list[dict[str, Any]]


@dataclass(frozen=True)
class Former:
    """The newest checkpoint of a run.

    Attributes:
        path: its file.
        state: its content.
        config: the configuration with which it was written.
    """

    path: Path
    state: dict[str, Any]
    config: Config


def former_state(
    config: Config, data: Mapping[str, str], allowed: AllowedChanges, say: Callable[[str], None]
) -> Former | None:
    """The newest checkpoint in the run's folder, from which it may go on; None where there is none.

    A collective: every rank must call it.

    Args:
        data: the identity of the data set.
        say: takes a line for the user.

    Raises:
        InputError: no checkpoint is whole, or the newest is of other settings or other data.
        RunError: a damaged checkpoint cannot be renamed.
    """
    found = newest_state(config.output, say)
    if found is None:
        return None
    path, state = found
    former = parse_stored_config(state["config"], str(path))
    # A folder's config.yaml has been compared already; its paths may have been edited after a move of data.
    if not (config.output / "config.yaml").exists():
        check_same_run(former, config, extend=allowed.extend)
    changed = _changed_data(config, state, data)
    if changed and not (allowed.data and data["data.classes"] == ", ".join(state["classes"])):
        raise InputError(
            f"output: {config.output} was trained on other data: {changed}; restore the data, choose another "
            "output or, if the classes are the same, go on with --accept-data"
        )
    if changed:
        say(f"note: the data has changed since {path} was written: {changed}")
    elif "data" not in state:
        say(f"note: {path} is of a former version and does not say which lists and images it was trained on")
    return Former(path, state, former)


def resume(
    former: Former | None,
    config: Config,
    method: Method,
    train_step: TrainStep,
    say: Callable[[str], None],
) -> Before:
    """Loads a checkpoint into `method` and `train_step`; without one the run is new.

    Raises:
        InputError: the networks or the optimiser have other parameters.
    """
    if former is None:
        return Before(0, Progress(), config.train.iterations, [])
    path, state = former.path, former.state
    restore(method, state["method"], path)
    optimizer = train_step.optimizer
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    check_optimizer(state["optimizer"], optimizer.state_dict(), shapes, path)
    train_step.load_state_dict(state, state["iteration"])
    iteration, total, longer = state["iteration"], former.config.train.iterations, config.train.iterations
    say(f"{path}: going on from iteration {iteration}")
    if longer > total:
        say(f"extended from {total} to {longer} iterations; the schedules go on as those of {longer}")
    return Before(iteration, Progress.from_tree(state["progress"]), total, state.get("starts", []))


def _changed_data(config: Config, state: Mapping[str, Any], data: Mapping[str, str]) -> str:
    """The part of the data that differs from the checkpoint's, with both values and its file; "" without."""
    classes = {"data.classes": ", ".join(state["classes"])}
    saved = state.get("data", {**data, **classes})  # former versions kept the classes alone
    changed = changed_data(saved, data)
    part = changed.partition(":")[0]
    place = getattr(config.data, "root" if part.startswith("files of") else part.removeprefix("data."), None)
    return f"{changed} ({place})" if isinstance(place, Path) else changed
