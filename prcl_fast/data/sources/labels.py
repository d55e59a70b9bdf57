"""Decoding of label files: from ids or colours to class ids."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from prcl_fast.config import DataConfig
from prcl_fast.config.data import MAX_PIXELS
from prcl_fast.data.source import IGNORE
from prcl_fast.data.sources.images import Mask, decode_mask
from prcl_fast.errors import InputError

Reading = Literal["grey", "indices", "colours"]


@dataclass(frozen=True)
class LabelContent:
    """The ids in one label file.

    Attributes:
        reading: of the file: ids of a grey image, indices of a palette, or colours of `data.palette`.
        pixels: number of pixels of each id that occurs; of each class id (255: not labeled) for colours.
        colours: the colour, as 0xRRGGBB, in which a viewer shows an id; empty for colours.
    """

    reading: Reading
    pixels: Mapping[int, int]
    colours: Mapping[int, int]


@dataclass(frozen=True, eq=False)
class LabelDecoder:
    """Decoder of label files of one kind.

    Masks of colours are RGB images and, where `colours` is given, palette images. A grey image is one of ids,
    unless all of `colours` are greys. Id 255 of a palette or grey image means "not labeled" where its colour
    is none of `colours`.

    Attributes:
        num_classes: C.
        table: uint8 [256], class id of every id in a file, or 255 for "not labeled".
        colours: uint8 [K, 3], for masks of colours: colour k is class k, or "not labeled" if k >= C. None
            refuses RGB masks, and reads palette images by their indices.
        ambiguous: ids that are refused, because they would become one with another id; the reason of each.
    """

    num_classes: int
    table: np.ndarray
    colours: np.ndarray | None = None
    ambiguous: Mapping[int, str] = field(default_factory=dict)

    def read(self, path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Class ids uint8 [H, W], 255 where not labeled.

        Raises:
            InputError: unreadable, an id out of range, a refused RGB mask, or an unknown colour; names the
            file.
        """
        return self._decode(path, max_pixels)[0]

    def read_content(self, path: Path, max_pixels: int = MAX_PIXELS) -> tuple[tuple[int, ...], LabelContent]:
        """Height and width of a label, and the ids in its file. Raises InputError as `read` does."""
        label, mask, reading = self._decode(path, max_pixels)
        values = label if reading == "colours" else mask.pixels
        found = np.bincount(values.ravel(), minlength=256)
        pixels = {int(value): int(found[value]) for value in np.flatnonzero(found)}
        colours: dict[int, int] = {}
        # The colours of grey ids matter only where data.palette could mean them.
        wanted = reading == "indices" or (reading == "grey" and self.colours is not None)
        if mask.colours is not None and wanted:
            codes = _codes(mask.colours).tolist()
            colours = {value: codes[value] for value in pixels if value < len(codes)}
        return label.shape, LabelContent(reading, pixels, colours)

    def accepts(self, content: LabelContent) -> bool:
        """Whether a file of this content can have been read by this decoder."""
        ids = np.array(list(content.pixels), dtype=np.int64)
        if content.reading == "colours":
            return bool(((ids < self.num_classes) | (ids == IGNORE)).all())
        return not self._wrong[ids].any()

    def class_pixels(self, content: LabelContent) -> list[int]:
        """The pixels of each class in a label file, then of those that are not labeled: C + 1 numbers."""
        counts = [0] * (self.num_classes + 1)
        for value, pixels in content.pixels.items():
            target = value if content.reading == "colours" else int(self.table[value])
            counts[self.num_classes if target == IGNORE else target] += pixels
        return counts

    def _decode(self, path: Path, max_pixels: int) -> tuple[np.ndarray, Mask, Reading]:
        mask = decode_mask(path, max_pixels)
        if mask.pixels.ndim == 3:
            return self._classes_of_colours(path, mask), mask, "colours"
        if self.colours is not None and mask.colours is not None and (mask.coloured or self._only_greys):
            return self._classes_of_palette(path, mask, mask.colours), mask, "colours"
        wrong = self._wrong.take(mask.pixels, mode="clip")  # nothing to clip in uint8; the fastest look-up
        if wrong.any():
            value = int(mask.pixels[wrong][0])
            reason = self.ambiguous.get(value) or (
                f"but there are {self.num_classes} classes "
                f"(0 to {self.num_classes - 1}, {IGNORE} for not labeled)"
            )
            raise InputError(f"{path}: label id {value}, {reason}")
        return self.table.take(mask.pixels, mode="clip"), mask, "indices" if mask.coloured else "grey"

    def _classes_of_colours(self, path: Path, mask: Mask) -> np.ndarray:
        if self.colours is None:
            raise InputError(
                f"{path}: an RGB mask, where ids are expected; data.palette says what its colours mean, and "
                "`prcl data convert` makes masks of ids"
            )
        check_opaque(path, mask)
        positions = colour_positions(mask.pixels, self.colours)
        if (positions < 0).any():
            raise InputError(
                f"{path}: colour {first_colour(mask.pixels, positions < 0)} is not in data.palette "
                "(a colour there after those of the classes means: not labeled)"
            )
        return np.where(positions < self.num_classes, positions, IGNORE).astype(np.uint8)

    def _classes_of_palette(self, path: Path, mask: Mask, embedded: np.ndarray) -> np.ndarray:
        assert self.colours is not None
        positions = index_positions(embedded, self.colours)
        unknown = (positions < 0).take(mask.pixels, mode="clip")
        if positions[IGNORE] < 0:
            unknown &= mask.pixels != IGNORE
        if unknown.any():
            value = int(mask.pixels[unknown][0])
            if value >= len(embedded):
                raise InputError(f"{path}: index {value}, but its palette has {len(embedded)} colours")
            raise InputError(
                f"{path}: id {value} has the colour {tuple(embedded[value].tolist())}, which is not in "
                "data.palette; a colour there after those of the classes means not labeled, and without "
                "data.palette the ids count"
            )
        known = (positions >= 0) & (positions < self.num_classes)
        return np.where(known, positions, IGNORE).astype(np.uint8).take(mask.pixels, mode="clip")

    @cached_property
    def _wrong(self) -> np.ndarray:
        """bool [256]: the ids that are refused."""
        wrong = (self.table >= self.num_classes) & (self.table != IGNORE)
        wrong[list(self.ambiguous)] = True
        return wrong

    @cached_property
    def _only_greys(self) -> bool:
        return self.colours is not None and only_greys(self.colours)

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits that differ between decoders that may read the same file differently."""
        digest = hashlib.sha256(bytes([self.num_classes]) + self.table.tobytes() + self._wrong.tobytes())
        digest.update(b"" if self.colours is None else self.colours.tobytes())
        return digest.hexdigest()[:12]


def label_decoder(data: DataConfig, num_classes: int) -> LabelDecoder:
    """The decoder that the keys of the configuration describe.

    Raises:
        InputError: `data.label_map` maps to an id that is no class, or `data.palette` has a colour twice.
    """
    colours = None
    if data.palette is not None:
        check_colours(data.palette, "data.palette")
        colours = np.array(data.palette, dtype=np.uint8)
    table = id_table(num_classes, data.label_map, data.ignore)
    return LabelDecoder(num_classes, table, colours, ambiguous_ids(data.label_map or {}, data.ignore))


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


def ambiguous_ids(label_map: Mapping[int, int], ignore: int) -> dict[int, str]:
    """The ids that `label_map` does not name, but to which it maps others; the reason of each for messages.

    They would stay as they are, and so become one with the ids that are mapped to them.
    """
    return {
        target: f"which data.label_map does not name, although it maps {source} to {target}; add "
        f"{target}: {target} to it to keep the id, or {target}: {IGNORE} if it means not labeled"
        for source, target in label_map.items()
        if target not in label_map and target not in (ignore, IGNORE)
    }


def colour_positions(mask: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """The index of each pixel's colour.

    Args:
        mask: uint8 [..., 3].
        colours: uint8 [K, 3], all different.

    Returns:
        int64 [...], 0 to K - 1, or -1 for any other colour.
    """
    codes = _codes(colours)
    order = np.argsort(codes)
    pixels = _codes(mask)
    places = np.searchsorted(codes, pixels, sorter=order).clip(max=len(codes) - 1)
    positions = order[places]
    return np.where(codes[positions] == pixels, positions, -1)


def index_positions(embedded: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """For each index of an image with the palette `embedded` [n, 3], the index of its colour in `colours`.

    Returns:
        int64 [256], -1 for other colours, and from n on.
    """
    positions = np.full(256, -1, dtype=np.int64)
    positions[: len(embedded)] = colour_positions(embedded, colours)
    return positions


def first_colour(mask: np.ndarray, where: np.ndarray) -> tuple[int, int, int]:
    """The first of the selected pixels' colours, for a message."""
    red, green, blue = mask[where][0].tolist()
    return red, green, blue


def only_greys(colours: np.ndarray) -> bool:
    """Whether all of `colours`, uint8 [K, 3], can stand in a grey image."""
    return bool((colours == colours[:, :1]).all())


def check_opaque(path: Path, mask: Mask) -> None:
    """Raises InputError if a mask of colours has transparent pixels."""
    if not mask.opaque:
        raise InputError(
            f"{path}: an RGB mask with transparent pixels; a colour must be opaque to be a class"
        )


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
