"""Progress of a run: its state beside weights and optimiser, and the checkpoint that it resumes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from prcl_fast.engine.rank_facts import check_same_checkpoint
from prcl_fast.errors import InputError
from prcl_fast.processes.collectives import broadcast_text, rank
from prcl_fast.runs.checkpoint import load_checkpoint, newest_checkpoint


@dataclass
class Progress:
    """Training time and evaluations of a run up to its current iteration."""

    seconds: float = 0.0  # of training and evaluation, over all commands that resumed the run
    best_miou: float = -1.0
    best_iteration: int = 0
    last: dict[str, Any] = field(default_factory=dict)  # figures of the last evaluation
    evaluated: int = 0  # iteration of the last evaluation

    def to_tree(self) -> dict[str, Any]:
        """Plain values for the checkpoint's entry "progress"."""
        return asdict(self)

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Progress:
        """The progress of a checkpoint that `runs.checkpoint_file.check_state` has accepted."""
        return cls(**{entry.name: tree[entry.name] for entry in fields(cls)})


def newest_state(folder: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint in a run's folder and its state, on all ranks; None where there is none.

    Rank 0 chooses the checkpoint, and every rank reads it. A collective: every rank must call it.

    Args:
        say: takes a line about each damaged checkpoint.

    Raises:
        InputError: no checkpoint is whole, or this rank cannot read the chosen one.
        DifferenceError: on every rank: it has other content on some of them.
        RunError: a damaged one cannot be renamed.
    """
    found = newest_checkpoint(folder, say) if rank() == 0 else None
    name = broadcast_text("" if found is None else found[0].name)
    if not name:
        return None
    path = folder / name
    if found is None:
        try:
            found = path, load_checkpoint(path)
        except InputError as error:
            raise InputError(f"output: process {rank()} cannot read what process 0 reads: {error}") from None
    check_same_checkpoint(path)
    return found
