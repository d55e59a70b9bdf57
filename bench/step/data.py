"""Configurations of `bench step`, with generated images of the data sets' sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from bench.ops.case import Sizes
from bench.ops.inputs import labels
from prcl_fast.config import Config, load_config, override_config
from prcl_fast.data.sources.images import save_index_png
from prcl_fast.data.sources.voc import voc_palette
from prcl_fast.device import choose_device
from prcl_fast.files.writing import replacing, write_text

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# The same for every candidate. An untrained network is never confident, so thresholds would leave the
# contrast without pixels. All candidates support local prototypes. With so many iterations the schedules are
# constant.
COMMON = (
    "method.delta_w=0",
    "method.delta_s=1",
    "method.prototype=local",
    "data.scan=false",
    "model.weights=null",
    "train.iterations=1000000",
)
# On a CPU workers would compete with the step for cores, and prepare images in another candidate's turn.
CPU = ("data.workers=0", "train.amp=off")
CUDA = ("train.amp=bf16",)


@dataclass(frozen=True)
class DataSet:
    """The generated images of a size."""

    config: str
    height: int
    width: int
    classes: int
    suffix: str
    labels_at_once: int  # images among which the classes are divided


DATA_SETS = {
    "voc": DataSet("voc/base.yaml", 375, 500, 21, ".jpg", 4),
    "cityscapes": DataSet("cityscapes/base.yaml", 1024, 2048, 19, ".png", 1),
}
SIZES = ("small", *DATA_SETS)
_FORMATS = {".jpg": "JPEG", ".png": "PNG"}
_SUBSETS = {"labeled": 8, "unlabeled": 16, "val": 1}


def size_config(size: str, folder: Path, overrides: Sequence[str]) -> Config:
    """The configuration of a size; its images are written into `folder`. Raises InputError."""
    if size == "small":
        return file_config(_CONFIGS / "demo.yaml", folder, overrides)
    data_set = DATA_SETS[size]
    write_images(folder, data_set)
    places = {subset: folder / f"{subset}.txt" for subset in _SUBSETS}
    generated = [
        "data.kind=folder",
        f"data.root={folder}",
        f"data.classes={folder / 'classes.txt'}",
        *(f"data.{subset}={path}" for subset, path in places.items()),
    ]
    return file_config(_CONFIGS / data_set.config, folder, [*generated, *overrides])


def file_config(path: Path, folder: Path, overrides: Sequence[str]) -> Config:
    """A configuration file with the settings common to all candidates, and then the overrides.

    Raises:
        InputError: names the file and the key.
    """
    own = [f"output={folder / 'runs'}", *overrides]
    device = choose_device(load_config(path, own).train.device)
    # Once more at the end: overrides take precedence over the common settings.
    return load_config(path, [*COMMON, *(CUDA if device.type == "cuda" else CPU), *own])


def candidate_config(config: Config, name: str, overrides: Sequence[str]) -> Config:
    """The configuration of one candidate, with its own output folder."""
    return override_config(config, [*overrides, f"output={config.output / name}"])


def write_images(folder: Path, data_set: DataSet) -> None:
    """Images with coherent labels, split files and class names for `data.kind: folder`."""
    host = torch.Generator().manual_seed(0)
    at_once, classes = data_set.labels_at_once, data_set.classes
    sizes = Sizes(at_once, data_set.height, data_set.width, 0, classes, 0, 0)
    colours = torch.rand(256, 3, generator=host)
    for subset, count in _SUBSETS.items():
        names = [f"{subset}_{number:03d}" for number in range(count)]
        for number, name in enumerate(names):
            if number % at_once == 0:
                group = labels(sizes, "coherent", host)
            label = group[number % at_once]
            image = Image.fromarray(_picture(label, colours, host))
            with replacing(folder / "images" / f"{name}{data_set.suffix}") as file:
                image.save(file, format=_FORMATS[data_set.suffix], quality=95)  # of JPEG
            if subset != "unlabeled":
                save_index_png(folder / "labels" / f"{name}.png", label.numpy(), voc_palette(classes))
        write_text(folder / f"{subset}.txt", "\n".join(names) + "\n")
    write_text(folder / "classes.txt", "\n".join(f"class {number}" for number in range(classes)) + "\n")


def _picture(label: torch.Tensor, colours: torch.Tensor, host: torch.Generator) -> np.ndarray:
    """Each class in its colour, with coarse and fine noise, so that it decodes like a photograph."""
    height, width = label.shape
    image = colours[label.long()].permute(2, 0, 1)
    for cell, strength in ((64, 0.2), (16, 0.1), (4, 0.05), (1, 0.02)):
        noise = torch.randn(1, 3, -(-height // cell), -(-width // cell), generator=host)
        image = image + strength * F.interpolate(noise, (height, width), mode="bilinear")[0]
    return image.clamp(0, 1).mul(255).to(torch.uint8).permute(1, 2, 0).numpy()
