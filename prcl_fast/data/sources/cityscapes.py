"""Cityscapes, in its official layout or in the flat layout of CPS."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prcl_fast.config import DataConfig
from prcl_fast.data.source import IGNORE
from prcl_fast.data.sources.file_source import (
    FileSource,
    LabelFile,
    class_names,
    class_palette,
    data_root,
    locate_files,
)
from prcl_fast.data.sources.labels import LabelDecoder, label_decoder
from prcl_fast.data.sources.listing import files_below
from prcl_fast.data.sources.splits import CITYSCAPES_SUFFIX, Entry
from prcl_fast.errors import InputError

CLASSES = (
    "road",
    "sidewalk",
    "building",
    "wall",
    "fence",
    "pole",
    "traffic light",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
)
PALETTE = np.array(
    [
        (128, 64, 128),
        (244, 35, 232),
        (70, 70, 70),
        (102, 102, 156),
        (190, 153, 153),
        (153, 153, 153),
        (250, 170, 30),
        (220, 220, 0),
        (107, 142, 35),
        (152, 251, 152),
        (70, 130, 180),
        (220, 20, 60),
        (255, 0, 0),
        (0, 0, 142),
        (0, 0, 70),
        (0, 60, 100),
        (0, 80, 100),
        (0, 0, 230),
        (119, 11, 32),
    ],
    dtype=np.uint8,
)
# Label id of each training id; all other label ids are not evaluated.
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
VAL_CITIES = ("frankfurt", "lindau", "munster")
TEST_CITIES = ("berlin", "bielefeld", "bonn", "leverkusen", "mainz", "munich")

_SUBFOLDERS = ("train", "val", "train_extra")  # the images of the last one have no fine labels


def build_cityscapes(data: DataConfig) -> FileSource:
    """Cityscapes below `data.root`: 19 classes by their training ids.

    Official layout: `leftImg8bit/{train,val}/CITY/`, and `gtFine/{train,val}/CITY/` with labelTrainIds, else
    labelIds. Flat layout: `images/{train,val}/NAME.png` and `segmentation/{train,val}/NAME_gtFine.png` with
    training ids. The images of `train_extra` have no fine labels and serve as unlabeled ones.

    Raises:
        InputError: naming the file, folder or key at fault.
    """
    classes = class_names(data.classes, CLASSES)
    palette = class_palette(data.palette, len(classes), PALETTE)
    trained = label_decoder(data, len(classes))
    original_table = np.full(256, IGNORE, dtype=np.uint8)
    original_table[list(LABEL_IDS)] = trained.table[: len(LABEL_IDS)]
    ambiguous = {
        label_id: f"training id {training_id}, {trained.ambiguous[training_id]}"
        for training_id, label_id in enumerate(LABEL_IDS)
        if training_id in trained.ambiguous
    }
    original = LabelDecoder(len(classes), original_table, trained.colours, ambiguous)
    root = data_root(data)
    layout: _OfficialLayout | _FlatLayout
    if (root / "leftImg8bit").is_dir():
        layout = _OfficialLayout(root, trained, original)
    elif (root / "images").is_dir():
        layout = _FlatLayout(root, trained)
    else:
        raise InputError(f"{root}: no folder leftImg8bit (or images, for the flat layout) here (data.root)")
    return locate_files(data, classes, palette, layout)


class _OfficialLayout:
    def __init__(self, root: Path, trained: LabelDecoder, original: LabelDecoder) -> None:
        self.root = root
        self.decoders = {"_gtFine_labelTrainIds.png": trained, "_gtFine_labelIds.png": original}
        self.images = self._index("leftImg8bit")
        self.labels = self._index("gtFine")

    def _index(self, folder: str) -> dict[str, Path]:
        cities = [city for below in _SUBFOLDERS for city in _folders(self.root / folder / below)]
        return {name: path for city in cities for name, path in files_below(city).items()}

    def image(self, entry: Entry) -> Path | None:
        return self.images.get(f"{entry.name}{CITYSCAPES_SUFFIX}.png")

    def label(self, entry: Entry, image: Path) -> LabelFile | None:
        for suffix, decoder in self.decoders.items():
            path = self.labels.get(entry.name + suffix)
            if path is not None:
                return LabelFile(path, decoder)
        return None

    def missing_image(self, entry: Entry) -> str:
        city = entry.name.partition("_")[0]
        if city in TEST_CITIES:
            return f"{city} belongs to the test set, whose labels are not public"
        name = f"{entry.name}{CITYSCAPES_SUFFIX}.png"
        places = ", ".join(f"{below}/{city}" for below in _SUBFOLDERS)
        return f"{name} is in none of {places} in {self.root / 'leftImg8bit'}"

    def missing_label(self, entry: Entry) -> str:
        city = entry.name.partition("_")[0]
        kinds = " nor ".join(entry.name + suffix for suffix in self.decoders)
        extra = ""
        if entry.name + f"{CITYSCAPES_SUFFIX}.png" in files_below(
            self.root / "leftImg8bit" / "train_extra" / city
        ):
            extra = " (images of train_extra have coarse labels alone, which are not read)"
        return f"neither {kinds} is in {self.root / 'gtFine'}, train/{city} or val/{city}{extra}"


class _FlatLayout:
    def __init__(self, root: Path, trained: LabelDecoder) -> None:
        self.root, self.decoder = root, trained
        self.images, self.labels = (
            {name: path for below in _SUBFOLDERS for name, path in files_below(root / kind / below).items()}
            for kind in ("images", "segmentation")
        )

    def image(self, entry: Entry) -> Path | None:
        return self.images.get(f"{entry.name}.png")

    def label(self, entry: Entry, image: Path) -> LabelFile | None:
        path = self.labels.get(f"{entry.name}_gtFine.png")
        return None if path is None else LabelFile(path, self.decoder)

    def missing_image(self, entry: Entry) -> str:
        return f"{entry.name}.png is in none of {', '.join(_SUBFOLDERS)} in {self.root / 'images'}"

    def missing_label(self, entry: Entry) -> str:
        return f"{entry.name}_gtFine.png is neither in {self.root / 'segmentation'}/train nor in val"


def _folders(folder: Path) -> list[Path]:
    return [path for path in files_below(folder).values() if path.is_dir()]
