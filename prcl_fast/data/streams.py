"""Random streams of the data pipeline: host generators keyed by seed, purpose and step.

Every number is a function of (seed, purpose, step): a counter-based generator is started anew for each use.
Resuming therefore needs no saved state, and a step can be drawn without the steps before it.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """Use of random numbers; each has its own streams."""

    ORDER_LABELED = 0
    ORDER_UNLABELED = 1
    WEAK_LABELED = 2
    WEAK_UNLABELED = 3
    STRONG = 4
    RANK = 6
    SCENE = 7


def generator(seed: int, purpose: Purpose, *, step: int = 0, stream: int = 0) -> np.random.Generator:
    """NumPy's Philox-4x64-10 with key (seed, purpose, stream) and counter (step, 0).

    The step is the counter's upper half, so that the numbers of two steps never overlap.
    """
    key = np.array([seed % 2**64, purpose | (stream << 8)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=step << 128))
