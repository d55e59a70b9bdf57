"""Spoilt inputs end in order: 320 of them, after those that once found something."""

from __future__ import annotations

from fuzzing import KINDS, known_seeds, run_many

# So many of each that one core is done in half a minute; training and evaluation cost the most.
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
