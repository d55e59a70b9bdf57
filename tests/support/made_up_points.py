"""Representations of a few pixels."""

from __future__ import annotations

import numpy as np


def points(seed=0):
    """Three classes of unequal size among five, in 4 dimensions and of various lengths."""
    rng = np.random.default_rng(seed)
    group = np.repeat([0, 1, 3], [4, 7, 5])
    x = (rng.normal(size=(16, 4)) + 2 * np.eye(4)[group]) * rng.uniform(0.1, 9, (16, 1))
    return x, group
