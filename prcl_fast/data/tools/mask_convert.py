"""Conversion of masks of colours, or of masks with other ids, to masks of class ids."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prcl_fast.config.data import MAX_PIXELS
from prcl_fast.data.source import IGNORE
from prcl_fast.data.sources.cityscapes import PALETTE as CITYSCAPES_PALETTE
from prcl_fast.data.sources.images import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    Mask,
    decode_mask,
    save_index_png,
    why_unread,
)
from prcl_fast.data.sources.labels import (
    check_colours,
    check_opaque,
    colour_positions,
    first_colour,
    index_positions,
    only_greys,
)
from prcl_fast.data.sources.voc import CLASSES as VOC_CLASSES
from prcl_fast.data.sources.voc import voc_palette
from prcl_fast.errors import InputError
from prcl_fast.files.reading import read_text
from prcl_fast.files.writing import replacing_folder

_MAX_BYTES = 2**20


@dataclass(frozen=True, eq=False)
class ColourCode:
    """Colours uint8 [K, 3] and their ids uint8 [K]."""

    colours: np.ndarray
    ids: np.ndarray


def read_colour_code(palette: str) -> ColourCode:
    """The code `voc` or `cityscapes`, or a text file of lines "R G B [ID] [name]"; ID defaults to 0, 1, ...

    Raises:
        InputError: naming file and line.
    """
    if palette == "voc":
        border = np.array([[224, 224, 192]], dtype=np.uint8)
        return ColourCode(
            np.concatenate([voc_palette(len(VOC_CLASSES)), border]),
            np.array([*range(len(VOC_CLASSES)), 255], dtype=np.uint8),
        )
    if palette == "cityscapes":
        black = np.zeros((1, 3), dtype=np.uint8)
        return ColourCode(
            np.concatenate([CITYSCAPES_PALETTE, black]),
            np.array([*range(len(CITYSCAPES_PALETTE)), 255], dtype=np.uint8),
        )
    if not os.path.exists(palette):
        raise InputError(f"{palette}: neither voc, nor cityscapes, nor a file of colours")
    text = read_text(Path(palette), "file of colours", _MAX_BYTES)
    rows: list[list[int]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        match = re.match(r"\s*(\d+)[\s,]+(\d+)[\s,]+(\d+)(?:[\s,]+(\d+))?(?:[\s,]|$)", line)
        values = [int(value) for value in match.groups(default=str(len(rows)))] if match else [256]
        if max(values) > 255:
            raise InputError(f"{palette}:{number}: expected R G B [ID] [name], each number 0 to 255")
        rows.append(values)
    if not rows:
        raise InputError(f"{palette}: no colours")
    check_colours([row[:3] for row in rows], palette)
    table = np.array(rows, dtype=np.uint8)
    return ColourCode(table[:, :3], table[:, 3])


def convert_masks(
    masks: str | Path,
    out: str | Path,
    *,
    code: ColourCode | None,
    label_map: Mapping[int, int],
    other: int | None = None,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Writes every mask of a folder and its subfolders as a palette PNG of the same name.

    Args:
        masks: folder of masks.
        out: folder to write, new or empty; written whole or not at all.
        code: ids of the colours of RGB and palette images, and of grey ones if all colours are greys; None
            refuses RGB masks, and takes palette indices as ids.
        label_map: new id for each id, of the file or of the colour; ids that are not listed stay.
        other: id for colours that are not in `code`; None refuses them.
        max_pixels: bound on the pixels of one mask.
        progress: called with (masks done, number of masks).

    Returns:
        The number of masks.

    Raises:
        InputError: naming the file and, for an unknown colour, the colour.
    """
    masks, out = Path(masks), Path(out)
    if not masks.is_dir():
        raise InputError(f"{masks}: no such folder")
    targets = _targets(masks)
    table = np.arange(256, dtype=np.uint8)
    for source, target in label_map.items():
        table[source] = target
    palette = _palette(code, table)
    with replacing_folder(out) as temporary:
        for done, (target_name, path) in enumerate(targets.items(), start=1):
            ids = _ids(path, decode_mask(path, max_pixels), code, other)
            _check_unambiguous(path, ids, label_map)
            save_index_png(temporary / target_name, table[ids], palette)
            if progress is not None:
                progress(done, len(targets))
    return len(targets)


def _ids(path: Path, mask: Mask, code: ColourCode | None, other: int | None) -> np.ndarray:
    if mask.pixels.ndim == 3:
        if code is None:
            raise InputError(f"{path}: an RGB mask; --palette says what its colours mean")
        check_opaque(path, mask)
        positions = colour_positions(mask.pixels, code.colours)
    elif code is None or mask.colours is None or (not mask.coloured and _grey_ids(path, mask, code)):
        return mask.pixels
    else:
        positions = index_positions(mask.colours, code.colours).take(mask.pixels)
    unknown = positions < 0
    if not unknown.any():
        return code.ids[positions]
    if other is None:
        raise InputError(
            f"{path}: colour {_first_colour(mask, unknown)} is not in the palette "
            "(--other gives such pixels an id)"
        )
    return np.where(unknown, np.uint8(other), code.ids[positions])


def _check_unambiguous(path: Path, ids: np.ndarray, label_map: Mapping[int, int]) -> None:
    """Raises InputError if an id that is not mapped would become one with an id that is mapped to it."""
    for source, target in label_map.items():
        if target not in (*label_map, IGNORE) and (ids == target).any():
            raise InputError(
                f"{path}: id {target}, which --map does not name, although it maps {source} to {target}; add "
                f"--map {target}={target} to keep the id, or --map {target}={IGNORE} if it means not labeled"
            )


def _grey_ids(path: Path, mask: Mask, code: ColourCode) -> bool:
    """Whether a grey mask is one of ids. Raises InputError where both ids and greys have a meaning."""
    if only_greys(code.colours):
        return False
    assert mask.colours is not None
    used = np.unique(mask.pixels)
    positions = index_positions(mask.colours, code.colours)[used]
    ids = code.ids[positions]
    if (positions < 0).any() or (ids == used).all():
        return True
    value = int(used[ids != used][0])
    colour = tuple(mask.colours[value].tolist())
    raise InputError(
        f"{path}: a grey mask, in which {value} can be an id or the colour {colour} of the palette; "
        "without --palette (--map alone) it is an id"
    )


def _first_colour(mask: Mask, where: np.ndarray) -> tuple[int, ...]:
    if mask.pixels.ndim == 3:
        return first_colour(mask.pixels, where)
    assert mask.colours is not None
    index = int(mask.pixels[where][0])
    return tuple(mask.colours[index].tolist()) if index < len(mask.colours) else ()


def _targets(masks: Path) -> dict[Path, Path]:
    """Every mask by the path of its output, in the order of names."""
    targets: dict[Path, Path] = {}
    for path in sorted(masks.rglob("*")):
        suffix, below = path.suffix.lower(), path.relative_to(masks)
        hidden = any(part.startswith(".") for part in below.parts)
        if hidden or suffix not in (*IMAGE_SUFFIXES, ".gif"):
            continue
        if suffix not in MASK_SUFFIXES:
            raise InputError(f"{path}: {why_unread(path, MASK_SUFFIXES)}")
        target = below.with_suffix(".png")
        if target in targets:
            raise InputError(f"{path}: becomes the same file as {targets[target]}")
        targets[target] = path
    if not targets:
        raise InputError(f"{masks}: no masks ({', '.join(MASK_SUFFIXES)}) in this folder")
    return targets


def _palette(code: ColourCode | None, table: np.ndarray) -> np.ndarray:
    """Colours of the output files: an id has the first colour that maps to it."""
    palette = voc_palette(256)
    palette[255] = (224, 224, 192)
    if code is not None:
        for colour, target in reversed(list(zip(code.colours, table[code.ids], strict=True))):
            palette[target] = colour
    return palette


def parse_label_map(pairs: Sequence[str]) -> dict[int, int]:
    """{3: 1} from "3=1". Raises InputError naming the pair."""
    label_map = {}
    for pair in pairs:
        match = re.fullmatch(r"(\d{1,3})=(\d{1,3})", pair)
        source, target = (int(value) for value in match.groups()) if match else (256, 256)
        if max(source, target) > 255:
            raise InputError(f"--map {pair}: expected FROM=TO with ids of 0 to 255")
        if source in label_map:
            raise InputError(f"--map {pair}: {source} is mapped twice")
        label_map[source] = target
    return label_map
