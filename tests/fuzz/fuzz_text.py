"""Configurations and split files spoilt at random."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from fuzz_bytes import Case, damaged

EXTREMES: list[Any] = [
    *(None, True, False, "", " ", "x", "off", "\u00e9\u4e2d\U0001f600", "\u202e", "a\nb", "\0", "\ud800"),
    *("../..", "/", "x" * 5000, "y/" * 3000, "none", "synthetic", "supervised", "config.yaml", "splits"),
    *(0, -1, 1, 2, 3, 255, 256, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**400, 0.0, -0.0, 1e-320, 1e-5),
    *(0.5, 1e38, 1e308, float("inf"), float("nan"), datetime.date(2024, 1, 1), b"\x00\xff", {1, 2}),
    *([], {}, [0], [1, 2], [64, 64], [[0, 0, 0]] * 300, ["a"] * 256, ["a", "a"], {0: 255, 300: 1}, {1: 2}),
    *({"name": "prcl"}, {"a": {"b": {"c": []}}}),
]
_BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"a{n}: &a{n} [{','.join(['*a' + str(n - 1 or '')] * 9)}]\n" for n in range(1, 9)
)
FRAGMENTS = [
    *("- a", "a: b: c", "? [x]\n: y", "? {x: y}\n: z", "<<: *nowhere", "<<: {seed: 1}", "&a [*a]", "--- "),
    *("[" * 2000, "{a: " * 2000, "- " * 500, "\ttab: 1", "%YAML 9.9", "...", "!!python/name:os.system", "="),
    *(
        '"\\uD800"',
        '"\\0": 1',
        "seed: 0x" + "f" * 500,
        "seed: " + "9" * 5000,
        "seed: 1:30",
        "1: 2",
        ".nan: 4",
    ),
    *("base: config.yaml", "base: .", "base: [a]", "base: /dev/zero", "'", '"', "|", ">", "@", "`", "*", "&"),
    *("x: &x {<<: *x}", "!!set {a}", "seed: !!int a", "seed: 2024-99-99", "~: 3", "!", "#", _BOMB),
]
_FILES = ("config.yaml", "split file")
_SECTIONS = (
    "output",
    "seed",
    "data.",
    "model.",
    "method.",
    "optim.",
    "train.",
    "eval.",
    "device:",
    "split file",
)


def configuration(rng: random.Random, folder: Path) -> Case:
    path = folder / "config.yaml"
    text = path.read_text()
    way = rng.randrange(10)
    if way < 2:
        path.write_bytes(damaged(rng, text.encode()))
    elif way < 4:
        lines = text.splitlines()
        for _ in range(rng.randint(1, 3)):
            _change_lines(rng, lines)
        path.write_text("\n".join(lines))
    else:
        tree = yaml.safe_load(text)
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            _change_tree(rng, tree)
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=rng.random() < 0.5)
        path.write_text(text, errors="replace")
    return Case(["train", "config.yaml"], (*_FILES, *_SECTIONS))


def _change_lines(rng: random.Random, lines: list[str]) -> None:
    place = rng.randrange(len(lines))
    way = rng.randrange(5)
    if way == 0:
        lines.insert(place, rng.choice(lines))
    elif way == 1 and len(lines) > 1:
        del lines[place]
    elif way == 2:
        lines[place] = " " * rng.randrange(6) + lines[place].lstrip()
    else:
        lines.insert(place, " " * rng.choice([0, 0, 2]) + rng.choice(FRAGMENTS))


def _change_tree(rng: random.Random, tree: dict[Any, Any]) -> None:
    holders = [tree, *(value for value in tree.values() if isinstance(value, dict) and value)]
    holder = rng.choice(holders)
    key = rng.choice(list(holder))
    way = rng.randrange(6)
    if way == 0 and len(holder) > 1:
        del holder[key]
    elif way == 1:
        new = rng.choice([f"{key}s", str(key)[:-1], str(key).upper(), 1, None, 1.5, "a.b", "\u2028", ""])
        holder[new] = holder.pop(key)
    elif way == 2 and isinstance(holder[key], list) and holder[key]:
        holder[key][rng.randrange(len(holder[key]))] = rng.choice(EXTREMES)
    elif way == 3:
        rng.choice(holders)[key] = holder[key]
    else:
        holder[key] = rng.choice(EXTREMES)


_LINES: dict[str, Callable[[str], str]] = {
    "ids": lambda name: name,
    "paths": lambda name: f"JPEGImages/{name}.jpg",
    "pairs": lambda name: f"JPEGImages/{name}.jpg SegmentationClass/{name}.png",
    "tabs": lambda name: f"/JPEGImages/{name}.jpg\t/SegmentationClass/{name}.png",
}
_SEPARATORS = [
    *(" ", "\t", "\t\t", ",", "\u00a0", "\u2003", "\u2028", "\x85", "\x00", "\r", "\x0b", "\\", "//", "/./"),
    *("/../", "\u0301", "\ufeff"),
]
_BAD_LINES = [
    *("../../x", "/etc/passwd", "C:\\x", "..\\x", ".", "x" * 300, "x" * 5000, "\u202egpj.x", "a.jpg " * 600),
    *("a.jpg" + " " * 4000 + ".jpg", "JPEGImages/" + "y" * 300 + ".jpg", "~", "-", "a b c", "JPEGImages"),
]


def split(rng: random.Random, folder: Path) -> Case:
    form = rng.choice(list(_LINES))
    for path in (folder / "splits").iterdir():
        path.write_text("".join(f"{_LINES[form](name)}\n" for name in path.read_text().split()))
    path = folder / "splits" / rng.choice(["labeled.txt", "unlabeled.txt", "val.txt"])
    lines = path.read_text().splitlines()
    way = rng.randrange(9)
    place = rng.randrange(len(lines))
    if way == 0:
        lines.append(rng.choice((folder / "splits" / "labeled.txt").read_text().splitlines()))
    elif way == 1:
        lines.insert(place, _LINES[rng.choice(list(_LINES))]("labeled_0001"))
    elif way == 2:
        at = rng.randrange(len(lines[place]) + 1)
        lines[place] = lines[place][:at] + rng.choice(_SEPARATORS) + lines[place][at:]
    elif way == 3:
        lines[place] = rng.choice(_BAD_LINES)
    elif way == 4:
        ends = ["", " ", "\r", "\r\r"]
        lines = [rng.choice(["", "  ", "\ufeff"]) + line + rng.choice(ends) for line in reversed(lines)]
    content = "\n".join(lines).encode() + rng.choice([b"\n", b"", b"\r\n", b"\n\n"])
    path.write_bytes(damaged(rng, content) if way > 4 else content)
    folders = ["data.kind=folder", "data.images=JPEGImages", "data.labels=SegmentationClass"]
    layout = rng.choice([folders, folders, []])
    return Case(["data", "check", "config.yaml", *layout], ("splits/", "JPEGImages", "data.images"))
