"""Spoilt inputs end with one clear line: 500 random ones, and those that once failed."""

from __future__ import annotations

from fuzzing import KINDS, known_seeds, run_many

# Numbers for a minute on one core; training and evaluation cost the most.
COUNTS = {
    "configurations": 80,
    "splits": 70,
    "masks": 50,
    "images": 50,
    "checkpoints": 30,
    "weights": 40,
    "labels": 40,
    "settings": 40,
    "photos": 40,
    "run_files": 30,
    "caches": 30,
}


def test_every_spoilt_input_ends_in_order_and_is_named() -> None:
    inputs = known_seeds() + [(kind, number) for kind in KINDS for number in range(COUNTS[kind])]
    assert len(inputs) >= 500
    faults = run_many(inputs)
    assert not faults, "\n".join(f"{kind} {number}: {fault}" for (kind, number), fault in faults.items())
