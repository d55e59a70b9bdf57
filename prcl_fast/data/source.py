"""The protocol of a data set: images, labels and splits by image id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

IGNORE = 255  # the class id of a pixel that is not labeled
SUBSETS = ("labeled", "unlabeled", "val")


@dataclass(frozen=True)
class Split:
    """The image ids of a subset, in order.

    Attributes:
        family: syntax of the split file, and the name of the public list if it is one.
        names: ids without repetition.
        fingerprint: 12 hex digits of SHA-256 over the ids joined by newlines; depends on their order.
    """

    family: str
    names: tuple[str, ...]
    fingerprint: str


class Source(Protocol):
    """A data set."""

    @property
    def classes(self) -> tuple[str, ...]:
        """C names in the order of their ids."""

    @property
    def palette(self) -> np.ndarray:
        """uint8 [C, 3]."""

    @property
    def splits(self) -> Mapping[str, Split]:
        """The subsets "labeled", "unlabeled" (may be empty) and "val"."""

    def image(self, name: str) -> np.ndarray:
        """uint8 [H, W, 3], RGB. Raises InputError that names the file."""

    def label(self, name: str) -> np.ndarray:
        """Class ids uint8 [H, W], 255 where not labeled. Raises InputError that names the file."""

    def pixel_state(self, name: str, labeled: bool) -> str:
        """A text that differs whenever `image(name)`, or `label(name)` if `labeled`, may differ.

        Caches use it as key. Raises InputError that names the file.
        """

    def content(self, name: str, labeled: bool, *, whole: bool) -> str:
        """A text that is equal for equal content of image, and label if `labeled`, wherever it lies.

        It holds cheap signs of the content, such as sizes of files, and with `whole` a checksum of all bytes.
        Raises InputError that names the file.
        """
