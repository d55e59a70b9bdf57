"""Decoding of label files: from ids or colours to class ids."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from prcl_fast.data.source import IGNORE
from prcl_fast.data.sources.images import MAX_PIXELS, read_mask
from prcl_fast.errors import InputError


@dataclass(frozen=True, eq=False)
class LabelDecoder:
    """Decoder of label files of one kind.

    Attributes:
        num_classes: C.
        table: uint8 [256], class id of every id in a file, or 255 for "not labeled".
        colours: uint8 [K, 3], for RGB masks: colour k is class k, or "not labeled" if k >= C. None refuses
            RGB masks.
        hint: advice for a refused RGB mask.
    """

    num_classes: int
    table: np.ndarray
    colours: np.ndarray | None = None
    hint: str = "`prcl data convert` makes masks of ids from RGB masks"

    def read(self, path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Class ids uint8 [H, W], 255 where not labeled.

        Raises:
            InputError: unreadable, an id out of range, a refused RGB mask, or an unknown colour; names the
            file.
        """
        mask = read_mask(path, max_pixels)
        if mask.ndim == 3:
            if self.colours is None:
                raise InputError(f"{path}: an RGB mask, where ids are expected; {self.hint}")
            positions = colour_positions(mask, self.colours)
            if (positions < 0).any():
                raise InputError(
                    f"{path}: colour {first_colour(mask, positions < 0)} is not in data.palette "
                    "(a colour there after those of the classes means: not labeled)"
                )
            return np.where(positions < self.num_classes, positions, IGNORE).astype(np.uint8)
        label = self.table.take(mask, mode="clip")  # nothing to clip in uint8; the fastest look-up
        wrong = (label >= self.num_classes) & (label != IGNORE)
        if wrong.any():
            raise InputError(
                f"{path}: label id {mask[wrong][0]}, but there are {self.num_classes} classes "
                f"(0 to {self.num_classes - 1}, {IGNORE} for not labeled)"
            )
        return label

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits that differ between decoders that may read the same file differently."""
        digest = hashlib.sha256(bytes([self.num_classes]) + self.table.tobytes())
        digest.update(b"" if self.colours is None else self.colours.tobytes())
        return digest.hexdigest()[:12]


def id_table(num_classes: int, label_map: Mapping[int, int] | None, ignore: int) -> np.ndarray:
    """The table of a `LabelDecoder` from the keys of the configuration.

    Ids not named in `label_map` stay as they are. `ignore` means "not labeled" unless `label_map` names it;
    255 always does.

    Raises:
        InputError: `label_map` maps to an id that is no class.
    """
    table = np.arange(256, dtype=np.uint8)
    table[ignore] = IGNORE
    for source, target in (label_map or {}).items():
        if target >= num_classes and target != IGNORE:
            raise InputError(
                f"data.label_map: {source} leads to {target}, but there are {num_classes} classes"
            )
        table[source] = target
    return table


def colour_positions(mask: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """The index of each pixel's colour.

    Args:
        mask: uint8 [H, W, 3].
        colours: uint8 [K, 3], all different.

    Returns:
        int64 [H, W], 0 to K - 1, or -1 for any other colour.
    """
    codes = _codes(colours)
    order = np.argsort(codes)
    pixels = _codes(mask)
    places = np.searchsorted(codes, pixels, sorter=order).clip(max=len(codes) - 1)
    positions = order[places]
    return np.where(codes[positions] == pixels, positions, -1)


def first_colour(mask: np.ndarray, where: np.ndarray) -> tuple[int, int, int]:
    """The first of the selected pixels' colours, for a message."""
    red, green, blue = mask[where][0].tolist()
    return red, green, blue


def check_colours(colours: Sequence[Sequence[int]], key: str) -> None:
    """Raises InputError if a colour occurs twice: masks would be ambiguous."""
    seen: dict[tuple[int, ...], int] = {}
    for position, colour in enumerate(map(tuple, colours)):
        if colour in seen:
            raise InputError(f"{key}: colour {colour} stands for both {seen[colour]} and {position}")
        seen[colour] = position


def _codes(colours: np.ndarray) -> np.ndarray:
    wide = colours.astype(np.int32)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
