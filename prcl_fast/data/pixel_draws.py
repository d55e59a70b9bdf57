"""Random pixels of images, in equal number of each class."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from prcl_fast.data.source import IGNORE


@dataclass(frozen=True, eq=False)
class DrawnPixels:
    """P pixels of images of h x w pixels, in the order of the images."""

    image: np.ndarray  # int64 [P], position in the list of images
    row: np.ndarray  # int64 [P], 0 .. h-1
    column: np.ndarray  # int64 [P], 0 .. w-1
    group: np.ndarray  # int64 [P], class for which a pixel was drawn
    truth: np.ndarray | None  # int64 [P], true class; None if no label was read


def draw_pixels(maps: Iterable[tuple[np.ndarray, np.ndarray | None]], count: int, seed: int) -> DrawnPixels:
    """At most `count` pixels of each class, uniformly from all images, without replacement.

    Every pixel has a random number, a function of (seed, image, position). A class takes its pixels with the
    smallest numbers. Equal class maps therefore give equal pixels, whichever network made them. Memory holds
    `count` pixels of each class, however many images there are.

    Args:
        maps: for each image the classes [h, w] for which to draw, and the true classes, if known. IGNORE is
            never drawn.
    """
    kept: dict[int, np.ndarray] = {}  # class -> float64 [n, 5]: number, image, row, column, truth
    labeled = False
    for index, (group, truth) in enumerate(maps):
        labeled = truth is not None
        numbers = np.random.Generator(np.random.Philox(key=[seed, index])).random(group.shape)
        for name in np.unique(group):
            if name == IGNORE:
                continue
            before = kept.get(int(name), np.empty((0, 5)))
            # Once a class is complete, few pixels of an image are below its largest number.
            limit = before[-1, 0] if len(before) == count else 1.0
            rows, columns = np.nonzero((group == name) & (numbers < limit))
            true = truth[rows, columns] if truth is not None else np.full(len(rows), IGNORE)
            found = np.stack([numbers[rows, columns], np.full(len(rows), index), rows, columns, true], axis=1)
            found = np.concatenate([before, found])
            kept[int(name)] = found[np.argsort(found[:, 0], kind="stable")[:count]]
    table = np.concatenate(
        [np.insert(found, 5, name, axis=1) for name, found in kept.items()] or [np.empty((0, 6))]
    )
    table = table[np.lexsort((table[:, 3], table[:, 2], table[:, 1]))].astype(np.int64)
    return DrawnPixels(table[:, 1], table[:, 2], table[:, 3], table[:, 5], table[:, 4] if labeled else None)
