"""Spoilt inputs end with one clear line: 320 random ones, and those that once failed."""

from __future__ import annotations

from fuzzing import KINDS, known_seeds, run_many

# Numbers for half a minute on one core; training and evaluation cost the most.
COUNTS = {
    "configurations": 80,
    "splits": 70,
    "masks": 50,
    "images": 50,
    "checkpoints": 30,
    "weights": 40,
}


def test_every_spoilt_input_ends_in_order_and_is_named() -> None:
    inputs = known_seeds() + [(kind, number) for kind in KINDS for number in range(COUNTS[kind])]
    assert len(inputs) >= 320
    faults = run_many(inputs)
    assert not faults, "\n".join(f"{kind} {number}: {fault}" for (kind, number), fault in faults.items())
