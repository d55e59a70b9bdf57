"""Random streams of the data pipeline: host generators keyed by seed, stream and step.

Every number is a function of (seed, stream, step): a counter-based generator is started anew for each use.
Resuming therefore needs no saved state, and a step can be drawn without the steps before it.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class RandomStream(IntEnum):
    """The independent streams of a seed, by the use of their numbers."""

    ORDER_LABELED = 0
    ORDER_UNLABELED = 1
    WEAK_LABELED = 2
    WEAK_UNLABELED = 3
    STRONG = 4
    RANK = 6
    SCENE = 7


def generator(seed: int, stream: RandomStream, *, step: int = 0, index: int = 0) -> np.random.Generator:
    """NumPy's Philox-4x64-10 with key (seed, stream, index) and counter (step, 0).

    The step is the counter's upper half, so that the numbers of two steps never overlap.

    Args:
        index: of a rank or subset, for a stream that has several.
    """
    key = np.array([seed % 2**64, stream | (index << 8)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=step << 128))
