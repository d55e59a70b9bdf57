"""Progress of a run: its entry in a checkpoint."""

from __future__ import annotations

from prcl_fast.engine.progress import Progress

# The entry of every checkpoint of format 2.
STORED = {
    "seconds": 12.5,
    "best_miou": 61.2,
    "best_iteration": 20,
    "last": {"miou": 60.0, "miou_student": 59.5},
    "evaluated": 30,
}


def test_progress_is_stored_under_the_keys_of_earlier_checkpoints() -> None:
    progress = Progress(12.5, 61.2, 20, {"miou": 60.0, "miou_student": 59.5}, 30)
    assert progress.to_tree() == STORED
    assert list(progress.to_tree()) == list(STORED)
    assert Progress.from_tree(STORED) == progress


def test_entries_that_this_version_does_not_know_are_left_out() -> None:
    assert Progress.from_tree(STORED | {"later": 1}) == Progress.from_tree(STORED)
