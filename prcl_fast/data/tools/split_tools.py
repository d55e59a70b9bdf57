"""Split files: draw labeled images, convert between families, write."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from prcl_fast.data.sources.cityscapes import TEST_CITIES, VAL_CITIES
from prcl_fast.data.sources.splits import CITYSCAPES_ID, CITYSCAPES_SUFFIX, SplitFile
from prcl_fast.errors import InputError
from prcl_fast.files.writing import write_text

Family = Literal["u2pl", "prcl", "unimatch", "cps"]
DatasetName = Literal["voc", "cityscapes"]


def convert_lines(file: SplitFile, family: Family, dataset: DatasetName) -> list[str]:
    """The lines of a split file in the form of another family.

    Raises:
        InputError: an id does not belong to the data set; names file and line.
    """
    lines = []
    for entry in file.entries:
        name = entry.name
        if "/" in name or (dataset == "cityscapes" and not CITYSCAPES_ID.fullmatch(name)):
            raise InputError(f"{file.path}:{entry.line}: {name} is no id of {dataset}")
        lines.append(_voc_line(name, family) if dataset == "voc" else _cityscapes_line(name, family))
    return lines


def choose_labeled(
    names: Sequence[str],
    count: int,
    seed: int,
    *,
    presence: Mapping[str, np.ndarray] | None = None,
    classes: Sequence[str] = (),
) -> set[str]:
    """Draws the images to label.

    Images are drawn in the order of a hash of seed and id, which depends neither on the order of `names` nor
    on a library's generator. Without `presence`, a smaller draw is part of every larger draw of the same
    seed.

    Args:
        names: ids to draw from.
        count: number of images to label; at least one image stays unlabeled.
        seed: of the draw.
        presence: bool [C] for every id, the classes in its label. If given, every class occurs in the draw:
            rare classes choose first, each the first image in the order of the draw that has the class.
        classes: C names, for messages; needed with `presence`.

    Raises:
        InputError: `count` is out of range or too small to hold every class, or no image has a class.
    """
    if not 1 <= count < len(names):
        raise InputError(f"{count} labeled images of {len(names)}: 1 to {len(names) - 1} are possible")
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed}\n{name}".encode()).digest())
    chosen = [] if presence is None else _covering(order, presence, classes)
    if len(chosen) > count:
        raise InputError(f"{count} labeled images do not hold every class; {len(chosen)} of this seed do")
    for name in order:
        if len(chosen) == count:
            break
        if name not in chosen:
            chosen.append(name)
    return set(chosen)


def write_lines(path: str | Path, lines: Sequence[str]) -> None:
    """Writes a new split file, whole or not at all. Raises InputError if it exists."""
    path = Path(path)
    if path.exists():
        raise InputError(f"{path}: exists already")
    write_text(path, "".join(f"{line}\n" for line in lines))


def _covering(order: Sequence[str], presence: Mapping[str, np.ndarray], classes: Sequence[str]) -> list[str]:
    images = np.sum([presence[name] for name in order], axis=0)
    if (images == 0).any():
        raise InputError(f"class {classes[int(np.argmin(images))]} is in none of the {len(order)} images")
    chosen: list[str] = []
    covered = np.zeros(len(classes), dtype=bool)
    for index in np.argsort(images, kind="stable"):
        if not covered[index]:
            chosen.append(next(name for name in order if presence[name][index]))
            covered |= presence[chosen[-1]]
    return chosen


def _voc_line(name: str, family: Family) -> str:
    return f"JPEGImages/{name}.jpg SegmentationClass/{name}.png" if family == "unimatch" else name


def _cityscapes_line(name: str, family: Family) -> str:
    city = name.partition("_")[0]
    part = "val" if city in VAL_CITIES else "test" if city in TEST_CITIES else "train"
    image = f"leftImg8bit/{part}/{city}/{name}{CITYSCAPES_SUFFIX}.png"
    return {
        "u2pl": image,
        "prcl": name + CITYSCAPES_SUFFIX,
        "unimatch": f"{image} gtFine/{part}/{city}/{name}_gtFine_labelTrainIds.png",
        "cps": f"/images/{part}/{name}.png\t/segmentation/{part}/{name}_gtFine.png",
    }[family]
