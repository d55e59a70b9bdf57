"""What the trainer and the evaluation need of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from prcl_fast.config import DataConfig
from prcl_fast.data.sources.cityscapes import build_cityscapes
from prcl_fast.data.sources.folder import build_folder
from prcl_fast.data.sources.labels import IGNORE
from prcl_fast.data.sources.splits import SUBSETS, Split
from prcl_fast.data.sources.voc import build_voc

__all__ = ["IGNORE", "SUBSETS", "Source", "Split", "build_source"]


class Source(Protocol):
    """A data set: images and labels by id."""

    @property
    def classes(self) -> tuple[str, ...]:
        """C names in the order of their ids."""

    @property
    def palette(self) -> np.ndarray:
        """uint8 [C, 3]."""

    @property
    def splits(self) -> Mapping[str, Split]:
        """The subsets "labeled", "unlabeled" (empty where there is none) and "val"."""

    def image(self, name: str) -> np.ndarray:
        """uint8 [H, W, 3], RGB. Raises InputError that names the file."""

    def label(self, name: str) -> np.ndarray:
        """Class ids uint8 [H, W], 255 where not labeled. Raises InputError that names the file."""

    def pixel_state(self, name: str, labeled: bool) -> str:
        """Changes whenever `image(name)`, or `label(name)` if `labeled`, may have changed: the key of caches.

        Raises InputError that names the file.
        """


def build_source(data: DataConfig) -> Source:
    """The data set of a configuration, with every image of its splits and every label needed found on disk.

    Raises:
        InputError: naming the split file and its line, the folder or the key at fault.
    """
    if data.kind == "synthetic":
        # Imported here because the generated data set builds on this module.
        from prcl_fast.data.sources.synthetic import SyntheticSource

        return SyntheticSource(data)
    return {"voc": build_voc, "cityscapes": build_cityscapes, "folder": build_folder}[data.kind](data)
