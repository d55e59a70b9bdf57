"""Folders spoilt at random: photos to predict, the files of a run, the caches of a user."""

from __future__ import annotations

import json
import os
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fuzz_bytes import Case, damaged
from PIL import Image

_NAMES = [
    *("plain", "with space", "[red]", "[/x]", ":skull:", "a\nb", "-dash", "--out", "%s", "{name}", "$HOME"),
    *("comma,comma", "quote'\"", "back\\slash", "\u202egpj", "\u4e2d\u6587", "x" * 240, "~", "a.b.c", "#"),
    *(unicodedata.normalize("NFD", "\u00dcbung\u00e9"), "\u00dcbung\u00e9", "\x1b[31mred", "\udcff"),
]
_SUFFIXES = [
    ".jpg",
    ".JPG",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".bmp",
    ".tif",
    ".webp",
    ".gif",
    ".heic",
    ".txt",
    "",
]
_FORMATS = ["JPEG", "JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF"]
_PLACES = ["", "", "", "sub", "sub/sub", ".hidden", "with space", "[red]"]
CACHED = ["train", "config.yaml", "data.cache=disk", "data.cache_dir=cache"]
DEEP = b"[" * 100_000
_LINES = [
    *(b"[" * 2000, b'{"kind": "eval"}', b"null", b"7", b"[]", b'""', b"{", b"\xff\xfe", b"\0" * 300),
    *(b'{"kind": "eval", "iteration": 1, "miou": 1' + b"0" * 400 + b"}", b"9" * 5000, DEEP),
    *(
        b'{"kind": "train", "iteration": %s, "loss": 1.0}' % value
        for value in (b"-1", b"1e400", b"null", b"[1]")
    ),
    *(
        b'{"kind": "train", "iteration": 1, "loss": %s}' % value
        for value in (b"NaN", b'"x"', b"{}", b"1e999")
    ),
    b'{"kind": "eval", "iteration": 1, "miou": "[/x]", "iou": {"[red]": 1.0, "\\n": null}}',
]


def photos(rng: random.Random, folder: Path) -> Case:
    """A folder for `prcl predict`, in which some files are no images, hidden, odd by name, or links."""
    place = folder / "photos"
    place.mkdir()
    _photo(rng, place / "good.png", "PNG")
    names = ["photos"]
    for _ in range(rng.randint(0, 4)):
        below = place / rng.choice(_PLACES)
        path = below / (rng.choice(["", "", "", ".", "._"]) + rng.choice(_NAMES) + rng.choice(_SUFFIXES))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)  # a name may hold a separator
            _one_file(rng, path, folder)
        except (FileExistsError, NotADirectoryError):  # by a former one of these files
            continue
        if rng.random() < 0.2:
            names.append(str(path.relative_to(folder)))
    out = rng.choice(["new", "new", "new", "photos/new", "photos", "new/[red]/a,b"])
    return Case(
        ["predict", "run", "--out", out, "--device", "cpu", "--", *names], (*names, "out"), (out, "out")
    )


def _photo(rng: random.Random, path: Path, kind: str) -> None:
    picture = Image.fromarray(np.frombuffer(rng.randbytes(24 * 16 * 3), np.uint8).reshape(24, 16, 3))
    exif = Image.Exif()
    if rng.random() < 0.5:
        exif[0x0112] = rng.choice([0, 1, 3, 6, 8, 9, 77])
    options = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    with path.open("xb") as file:
        picture.resize(rng.choice([(16, 24), (24, 16), (1, 1), (40, 3)])).save(file, format=kind, **options)


def _one_file(rng: random.Random, path: Path, folder: Path) -> None:
    way = rng.randrange(8)
    if way < 4:
        _photo(rng, path, rng.choice(_FORMATS))
    if way == 3:
        path.write_bytes(damaged(rng, path.read_bytes()))
    elif way == 4:
        path.touch(exist_ok=False)
    elif way == 5:
        os.mkfifo(path)
    elif way == 6:
        path.symlink_to(rng.choice(["/dev/zero", "nowhere", path.name, ".", folder / "photos/good.png"]))
    elif way == 7:
        path.mkdir()


def run_files(rng: random.Random, folder: Path) -> Case:
    """A run folder with one file in the place of another kind of file, or with other content."""
    (folder / "victim").write_text("precious\n")
    (folder / "elsewhere").mkdir()
    names = [
        "metrics.jsonl",
        "config.yaml",
        "last.pt",
        "best.pt",
        "log.txt",
        "figures",
        "tensorboard",
        "lock",
    ]
    present = sorted(path.name for path in (folder / "run").iterdir())
    path = folder / "run" / rng.choice([*names, *present])
    if path.name == "metrics.jsonl" and rng.random() < 0.6:
        _other_records(rng, path)
    elif path.is_file() and rng.random() < 0.3:
        path.write_bytes(damaged(rng, path.read_bytes()))
    else:
        path.unlink(missing_ok=True)
        _other_kind(rng, path, folder)
    commands = [
        *(["train", "run.yaml"], ["train", "run.yaml", "train.iterations=3"], ["eval", "run"]),
        *(["figures", "run"], ["compare", "run", "--out", "new"], ["plan", "run.yaml"]),
    ]
    named = ("run", "train.iterations", path.name)
    return Case(rng.choice(commands), named, ("run", "new"))


def _other_records(rng: random.Random, path: Path) -> None:
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for _ in range(rng.randint(1, 3)):
        lines.insert(rng.randrange(len(lines)), rng.choice(_LINES))
    path.write_bytes(b"\n".join(lines))


def _other_kind(rng: random.Random, path: Path, folder: Path) -> None:
    targets: list[str | Path] = [folder / "victim", folder / "elsewhere", "/dev/zero", "nowhere", path.name]
    kinds: list[Callable[[], object]] = [
        lambda: path.symlink_to(rng.choice(targets)),
        lambda: path.symlink_to(rng.choice(targets)),
        lambda: os.mkfifo(path),
        path.mkdir,
        path.touch,
        lambda: path.write_bytes(DEEP),
        lambda: path.write_bytes(rng.randbytes(64)),
    ]
    rng.choice(kinds)()


def caches(rng: random.Random, folder: Path) -> Case:
    """The caches of decoded images and of scanned labels, damaged since `CACHED` has made them."""
    (folder / "victim").write_text("precious\n")
    (folder / "elsewhere").mkdir()
    cache = Path(os.environ["XDG_CACHE_HOME"])
    files = [path for place in (cache, folder / "cache") for path in place.rglob("*") if path.is_file()]
    if files and rng.random() < 0.9:
        path = rng.choice(files)
        if path.suffix == ".json" and rng.random() < 0.7:
            path.write_text(_other_counts(rng, path.read_text(errors="replace")))
        elif rng.random() < 0.6:
            path.write_bytes(damaged(rng, path.read_bytes()))
        else:
            path.unlink()
            _other_kind(rng, path, folder)
    return Case(CACHED, ("cache",), ("out", "cache"))


def _other_counts(rng: random.Random, text: str) -> str:
    values = [None, [], {}, "x", -1, 1e400, 10**30, True, [1], [None] * 7, ["1"] * 7, [2**70] * 7]
    try:
        tree = json.loads(text)
        holder = tree
        while isinstance(holder, dict) and holder and rng.random() < 0.7:
            key = rng.choice(list(holder))
            if not isinstance(holder[key], (dict, list)) or not holder[key]:
                break
            holder = holder[key]
        if isinstance(holder, list):
            holder[rng.randrange(len(holder))] = rng.choice(values)
        else:
            holder[rng.choice([*holder, "x"])] = rng.choice(values)
        return json.dumps(tree)
    except (ValueError, RecursionError):
        return rng.choice(["", "null", "[" * 100_000, '{"version": 1, "labels": null}'])
