"""A generated data set of textured shapes: small enough for a CPU, hard enough to compare methods.

Every image is a function of (seed, subset, index), rendered by `prcl_fast.data.sources.scene`.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from prcl_fast import __version__
from prcl_fast.config import DataConfig, SyntheticConfig
from prcl_fast.data.source import SUBSETS, Split
from prcl_fast.data.sources.images import save_index_png
from prcl_fast.data.sources.scene import CLASSES, render
from prcl_fast.data.sources.splits import make_split
from prcl_fast.data.sources.voc import voc_palette
from prcl_fast.errors import InputError
from prcl_fast.files.writing import replacing_folder, write_text

SIDES = (64, 128)  # smallest and largest height and width


class SyntheticSource:
    """The data set of `data.kind: synthetic`. Implements `prcl_fast.data.source.Source`.

    Raises:
        InputError: an image size outside 64..128.
    """

    def __init__(self, data: DataConfig) -> None:
        _check_size(data.synthetic, "data.synthetic.size")
        self.config = data.synthetic
        self.classes = CLASSES
        self.palette = voc_palette(len(CLASSES))
        self.splits: Mapping[str, Split] = {
            subset: make_split(_names(self.config, subset), "ids") for subset in SUBSETS
        }

    def image(self, name: str) -> np.ndarray:
        """uint8 [H, W, 3], RGB."""
        return self._scene(name)[0].copy()

    def label(self, name: str) -> np.ndarray:
        """Class ids uint8 [H, W]."""
        return self._scene(name)[1].copy()

    def pixel_state(self, name: str, labeled: bool) -> str:
        """Name, settings, and the version of this package, which renders the images."""
        return f"synthetic {name} {self.config.size} {self.config.seed} {__version__}"

    def content(self, name: str, labeled: bool, *, whole: bool) -> str:
        """Name and settings; with `whole` a CRC of the pixels, which this version of the package renders."""
        settings = f"synthetic {name} {self.config.size} {self.config.seed}"
        if not whole:
            return settings
        checksum = zlib.crc32(self.image(name).tobytes())
        if labeled:
            checksum = zlib.crc32(self.label(name).tobytes(), checksum)
        return f"{settings} {checksum:08x}"

    def _scene(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        subset, _, index = name.rpartition("_")
        height, width = self.config.size
        return _cached_scene(height, width, self.config.seed, subset, int(index))


def write_synthetic(folder: str | Path, config: SyntheticConfig) -> None:
    """Writes the data set in VOC's layout, with split files and a `config.yaml` that is ready to train.

    Images are JPEG of quality 95 without chroma subsampling; unlabeled images get no mask. The folder appears
    whole or not at all.

    Raises:
        InputError: the folder exists and is not empty, or an image size outside 64..128.
    """
    _check_size(config, "size")
    folder = Path(os.path.abspath(folder))
    with replacing_folder(folder) as temporary:
        for subset in SUBSETS:
            _write_subset(temporary, config, subset)
        write_text(temporary / "config.yaml", _training_config(folder.name, config))


def _check_size(config: SyntheticConfig, key: str) -> None:
    if not all(SIDES[0] <= side <= SIDES[1] for side in config.size):
        raise InputError(f"{key}: {config.size} is outside {SIDES[0]} to {SIDES[1]} pixels")


def _names(config: SyntheticConfig, subset: str) -> list[str]:
    return [f"{subset}_{index:04d}" for index in range(getattr(config, subset))]


def _write_subset(folder: Path, config: SyntheticConfig, subset: str) -> None:
    images = folder / "JPEGImages"
    images.mkdir(parents=True, exist_ok=True)
    names = _names(config, subset)
    for index, name in enumerate(names):
        image, label = render(config.size[0], config.size[1], config.seed, SUBSETS.index(subset), index)
        Image.fromarray(image).save(images / f"{name}.jpg", quality=95, subsampling=0)
        if subset != "unlabeled":
            save_index_png(folder / "SegmentationClass" / f"{name}.png", label, voc_palette(len(CLASSES)))
    write_text(folder / "splits" / f"{subset}.txt", "\n".join(names) + "\n")


def _training_config(name: str, config: SyntheticConfig) -> str:
    batch_labeled, batch_unlabeled = (min(4, count) for count in (config.labeled, config.unlabeled))
    mix = "classmix" if batch_unlabeled > 1 else "none"
    tree = {
        "seed": 0,
        "output": f"runs/{name}",
        "data": {
            "kind": "voc",
            "root": ".",
            "labeled": "splits/labeled.txt",
            "unlabeled": "splits/unlabeled.txt",
            "val": "splits/val.txt",
            "classes": list(CLASSES),
            "crop": list(config.size),
            # Classes differ in colour and texture: strong augmentation must keep both recognisable.
            "augment": {
                "scale": [0.75, 1.5],
                "brightness": 0.2,
                "contrast": 0.2,
                "saturation": 0.2,
                "hue": 0.03,
                "grayscale": 0.0,
                "blur": 0.2,
                "blur_sigma": [0.1, 1.0],
            },
            # For small images a cache is cheaper than the transfer between processes.
            "workers": 0,
            "cache": "ram",
        },
        "model": {"backbone": "resnet18", "output_stride": 16, "width": 64, "dim": 32},
        # A short run needs short moving averages, over ten to thirty steps.
        "method": {
            "name": "prcl",
            "mix": mix,
            "delta_u": 0.95,
            "delta_w": 0.9,
            "ema": 0.97,
            "prototype": "ema",
            "prototype_ema": 0.9,
            "normalize": True,
            "reduction": "mean",
            "tau": 0.01,
            "lambda_c": 1.0,
        },
        "optim": {"lr": 5.0e-2},
        "train": {
            "iterations": 300,
            "batch_labeled": batch_labeled,
            "batch_unlabeled": batch_unlabeled,
            "eval_every": 100,
            "save_every": 100,
        },
    }
    text = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None)
    return f"# A small PRCL run on the generated images beside this file: prcl train config.yaml\n{text}"


@lru_cache(maxsize=4096)
def _cached_scene(
    height: int, width: int, seed: int, subset: str, index: int
) -> tuple[np.ndarray, np.ndarray]:
    return render(height, width, seed, SUBSETS.index(subset), index)
