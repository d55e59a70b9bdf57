"""PASCAL VOC 2012, with or without the masks of SBD, and other data sets in its layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prcl_fast.config import DataConfig
from prcl_fast.data.sources.file_source import (
    FileSource,
    LabelFile,
    class_names,
    class_palette,
    data_root,
    locate_files,
)
from prcl_fast.data.sources.images import IMAGE_SUFFIXES
from prcl_fast.data.sources.labels import LabelDecoder, label_decoder
from prcl_fast.data.sources.listing import files_below
from prcl_fast.data.sources.splits import Entry
from prcl_fast.errors import InputError

CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)

_ROOTS = ("", "VOC2012", "VOCdevkit/VOC2012")
_AUGMENTED, _ORIGINAL = "SegmentationClassAug", "SegmentationClass"


def voc_palette(num_classes: int) -> np.ndarray:
    """VOC's colours, uint8 [C, 3]: bits 3k, 3k+1, 3k+2 of the id are bit 7-k of red, green, blue."""
    ids = np.arange(num_classes)
    colours = np.zeros((num_classes, 3), dtype=np.uint8)
    for k in range(8):
        for channel in range(3):
            colours[:, channel] |= ((ids >> (3 * k + channel) & 1) << (7 - k)).astype(np.uint8)
    return colours


def build_voc(data: DataConfig) -> FileSource:
    """A data set in VOC's layout below `data.root`, 21 classes unless `data.classes` says otherwise.

    `JPEGImages/`, with images of any suffix, and `SegmentationClassAug/` or else `SegmentationClass/`, are in
    root itself, in VOC2012 or in VOCdevkit/VOC2012.

    Raises:
        InputError: naming the file, folder or key at fault.
    """
    classes = class_names(data.classes, CLASSES)
    palette = class_palette(data.palette, len(classes), voc_palette(len(classes)))
    decoder = label_decoder(data, len(classes))
    return locate_files(data, classes, palette, _VocLayout(data_root(data), decoder))


class _VocLayout:
    def __init__(self, root: Path, decoder: LabelDecoder) -> None:
        bases = [root / below for below in _ROOTS if (root / below / "JPEGImages").is_dir()]
        if not bases:
            raise InputError(
                f"{root}: no folder JPEGImages here, in VOC2012 or in VOCdevkit/VOC2012 (data.root)"
            )
        masks = [bases[0] / name for name in (_AUGMENTED, _ORIGINAL) if (bases[0] / name).is_dir()]
        if not masks:
            raise InputError(f"{bases[0]}: no folder {_AUGMENTED} or {_ORIGINAL} (data.root)")
        self.image_folder, self.label_folder = bases[0] / "JPEGImages", masks[0]
        self.images, self.labels = files_below(self.image_folder), files_below(self.label_folder)
        self.decoder = decoder

    def image(self, entry: Entry) -> Path | None:
        names = (f"{entry.name}{suffix}" for suffix in IMAGE_SUFFIXES)
        return next((self.images[name] for name in names if name in self.images), None)

    def label(self, entry: Entry, image: Path) -> LabelFile | None:
        path = self.labels.get(f"{entry.name}.png")
        return None if path is None else LabelFile(path, self.decoder)

    def missing_image(self, entry: Entry) -> str:
        return f"{self.image_folder / entry.name}.jpg does not exist"

    def missing_label(self, entry: Entry) -> str:
        hint = ""
        if self.label_folder.name == _ORIGINAL:
            hint = f" (lists of 10582 images need the masks of SBD, in {_AUGMENTED})"
        return f"{self.label_folder / entry.name}.png does not exist{hint}"
