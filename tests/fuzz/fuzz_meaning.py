"""Readable inputs whose meaning is at fault: ids and colours of masks, settings on the command line."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from fuzz_bytes import Case
from PIL import Image

_COLOURS = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128]]
_GREYS = [[value] * 3 for value in (0, 50, 100, 150, 200, 255)]


def labels(rng: random.Random, folder: Path) -> Case:
    """Masks of a random mode and palette, with a random label map, palette and number of classes."""
    path = folder / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    data = tree["data"]
    count = rng.choice([2, 3, 6, 6])
    data["classes"] = [f"class{index}" for index in range(count)]
    colours = rng.choice([None, _COLOURS, _COLOURS, _GREYS, _COLOURS[1:] + _COLOURS[:1]])
    data["palette"] = colours[:count] if colours else None
    data["label_map"] = _label_map(rng, count)
    if rng.random() < 0.2:
        data["ignore"] = rng.choice([0, [0, 5], 255, []])
    path.write_text(yaml.safe_dump(tree))
    mode = rng.choice(["ids", "ids", "binary", "palette", "shuffled", "colours", "grey", "empty"])
    for file in sorted((folder / "SegmentationClass").iterdir()):
        if rng.random() < 0.9:
            _write_mask(rng, file, mode, count, colours or _COLOURS)
    command = rng.choice([["train"], ["train"], ["data", "check"], ["plan"]])
    named = ("SegmentationClass", "data.", "class", "label_map", "split", "config.yaml")
    return Case([*command, "config.yaml"], named)


def _label_map(rng: random.Random, count: int) -> dict[int, int] | None:
    ids = [0, 1, 2, 5, 7, 128, 254, 255]
    way = rng.randrange(4)
    if way == 0:
        return None
    if way == 1:
        return {254: 255}
    if way == 2:
        return {0: 1, 1: 0}
    return {rng.choice(ids): rng.choice([*range(count), 255]) for _ in range(rng.randint(1, 4))}


def _write_mask(rng: random.Random, file: Path, mode: str, count: int, colours: list[list[int]]) -> None:
    ids = np.array(Image.open(file)) % count
    if mode == "binary":
        Image.fromarray(np.where(ids > 0, 255, 0).astype(np.uint8)).save(file)
        return
    if mode == "empty":
        ids[:] = rng.choice([255, 254, 0])
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = colours
    if mode in ("palette", "shuffled"):
        order = rng.sample(range(count), count) if mode == "shuffled" else list(range(count))
        stored = np.zeros(256, np.uint8)
        for position, index in enumerate(order):
            stored[index] = position
        picture = Image.fromarray(stored[ids]).convert("P")
        picture.putpalette(table[order].tobytes())
        picture.save(file)
    elif mode == "colours":
        Image.fromarray(table[ids]).convert(rng.choice(["RGB", "RGBA"])).save(file)
    elif mode == "grey":
        Image.fromarray(table[ids]).convert(rng.choice(["L", "1", "LA"])).save(file)
    else:
        Image.fromarray(ids.astype(np.uint8)).save(file)


_VALUES: dict[str, list[Any]] = {
    "data.crop": ["[16,16]", "[64,64]", "64", "[16,64]", "[1,1]", "[1000000,16]"],
    "train.batch_labeled": [1, 2, 3, 10**9],
    "train.batch_unlabeled": [1, 2, 10**9],
    "train.accumulate": [1, 2],
    "model.backbone": ["resnet18", "resnet50", "mobilenet_v2", "[/x]"],
    "model.dim": [1, 8, 10**7],
    "model.width": [1, 16, 10**7],
    "model.output_stride": [8, 16],
    "method.name": ["supervised", "mean_teacher", "prcl", "pcr", "pps", "cps", "[red]"],
    "method.anchors": [1, 10**9],
    "method.negatives": [1, 10**12],
    "output": ["[/x]", ":skull:", "out", "a,b", "-x", "victim/x"],
    "data.classes": ["supervised", "[a,b]", "[[/x],b,c,d,e,f]"],
    "data.max_pixels": [1, 10**12],
    "lr": [0.1],
    "train.epochs": [3],
    "model.weights": ["run", "missing.pth", ".", "config.yaml"],
    "eval.scales": ["[1.0]", "[0.0001]", "[1000]"],
}


def settings(rng: random.Random, folder: Path) -> Case:
    """Settings on the command line: the smallest and the largest sizes, markup, paths, keys that are near."""
    (folder / "victim").write_text("precious\n")
    keys = rng.sample(list(_VALUES), rng.randint(1, 4))
    overrides = [f"{key}={rng.choice(_VALUES[key])}" for key in keys]
    extend = ["--extend"] if rng.random() < 0.1 else []
    named = (*keys, "data.", "method.", "train.", "run", "output", "victim")
    return Case(["train", "config.yaml", *overrides, *extend], named, ("out", *_VALUES["output"][:-1]))
