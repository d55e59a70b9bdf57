"""`prcl data split make|show|convert|compare`."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prcl_fast.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from prcl_fast.config import Config

app = typer.Typer(help="Make, show, convert and compare split files.", no_args_is_help=True)


class FamilyName(str, Enum):
    """The projects whose split format can be written."""

    u2pl = "u2pl"
    prcl = "prcl"
    unimatch = "unimatch"
    cps = "cps"


class DatasetName(str, Enum):
    """The data sets that those projects share."""

    voc = "voc"
    cityscapes = "cityscapes"


@app.command("make")
def make(
    pool: Annotated[
        Path,
        typer.Argument(
            help="Split file with all ids, or a configuration (.yaml) with its labeled and unlabeled images."
        ),
    ],
    labeled: Annotated[int, typer.Argument(help="Number of labeled images.")],
    out: Annotated[Path, typer.Option(help="Folder for labeled.txt and unlabeled.txt.")],
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    cover: Annotated[
        bool,
        typer.Option(
            "--cover",
            help="Have every class in a labeled image; needs a configuration and labels.",
        ),
    ] = False,
) -> None:
    """Draw the labeled images at random; the others are unlabeled.

    A seed gives the same draw on any machine. Without --cover the images of a smaller draw are among those of
    a larger one.
    """
    from prcl_fast.config import load_config
    from prcl_fast.data.sources.splits import read_split
    from prcl_fast.data.tools.split_tools import choose_labeled, write_lines
    from prcl_fast.files.locking import locked_folder

    presence: Mapping[str, np.ndarray] | None = None
    classes: tuple[str, ...] = ()
    if pool.suffix in (".yaml", ".yml"):
        config = load_config(pool)
        lines = _lines_of(config, pool)
        if cover:
            presence, classes = _class_presence(config)
    elif cover:
        raise InputError(f"--cover: needs a configuration, which names the labels, not {pool}")
    else:
        lines = {entry.name: entry.text for entry in read_split(pool).entries}
    chosen = choose_labeled(list(lines), labeled, seed, presence=presence, classes=classes)
    parts = {
        "labeled": [line for name, line in lines.items() if name in chosen],
        "unlabeled": [line for name, line in lines.items() if name not in chosen],
    }
    with locked_folder(out, "--out"):
        for part in parts:
            if (out / f"{part}.txt").exists():
                raise InputError(f"{out / part}.txt: exists already")
        for part, part_lines in parts.items():
            write_lines(out / f"{part}.txt", part_lines)
    show([out / f"{part}.txt" for part, part_lines in parts.items() if part_lines])


@app.command("show")
def show(files: Annotated[list[Path], typer.Argument(help="Split files of any format.")]) -> None:
    """Show split files: images, format, public list, hash."""
    from prcl_fast.console import print_table
    from prcl_fast.data.sources.splits import read_split

    rows = []
    for path in files:
        file = read_split(path)
        first = ", ".join(file.names[:3]) + (", ..." if len(file.names) > 3 else "")
        rows.append([str(path), str(len(file.names)), file.split.fingerprint, file.split.family, first])
    print_table("Splits", ["file", "images", "hash", "family", "first"], rows, right=(1,))


@app.command("convert")
def convert(
    file: Annotated[Path, typer.Argument(help="Split file of any format.")],
    to: Annotated[FamilyName, typer.Option(help="Project whose format to write.")],
    dataset: Annotated[DatasetName, typer.Option(help="Data set of the images.")],
    out: Annotated[Path, typer.Option(help="File to write; it must not exist.")],
) -> None:
    """Write a split file in the format of another project."""
    from prcl_fast.data.sources.splits import read_split
    from prcl_fast.data.tools.split_tools import convert_lines, write_lines

    write_lines(out, convert_lines(read_split(file), to.value, dataset.value))
    show([file, out])


@app.command("compare")
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Split file of any format.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Split file of any format.")],
) -> None:
    """Compare the images of two split files, whatever their formats."""
    from prcl_fast.console import print_table
    from prcl_fast.data.sources.splits import read_split

    a, b = read_split(first), read_split(second)
    show([first, second])
    common = set(a.names) & set(b.names)
    only_a, only_b = ([name for name in file.names if name not in common] for file in (a, b))
    in_order = [name for name in a.names if name in common] == [name for name in b.names if name in common]
    verdict = "different images"
    if not only_a and not only_b:
        verdict = "the same list" if in_order else "the same images in another order"
    rows = [
        ["in both", str(len(common)), "same order" if in_order else "another order"],
        ["only in A", str(len(only_a)), ", ".join(only_a[:3])],
        ["only in B", str(len(only_b)), ", ".join(only_b[:3])],
    ]
    print_table(f"A and B: {verdict}", ["", "images", ""], rows, right=(1,))


def _lines_of(config: Config, path: Path) -> dict[str, str]:
    """The lines of the labeled and unlabeled images by id; the ids alone if the files' formats differ."""
    from prcl_fast.data.sources.splits import check_disjoint, read_split

    if config.data.kind == "synthetic":
        raise InputError(f"{path}: data.kind: a synthetic data set has its own splits")
    files = [read_split(file) for file in (config.data.labeled, config.data.unlabeled) if file is not None]
    check_disjoint(files)
    one_form = len({file.form for file in files}) == 1
    return {entry.name: entry.text if one_form else entry.name for file in files for entry in file.entries}


def _class_presence(config: Config) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The classes in the label of every labeled and unlabeled image."""
    from prcl_fast.console import counting
    from prcl_fast.data.sources import build_source
    from prcl_fast.data.tools.scan import scan_labels

    source = build_source(config.data)
    subsets = ("labeled", "unlabeled")
    with counting("read labels") as progress:
        scan = scan_labels(source, subsets, workers=config.data.workers, progress=progress).check()
    presence = {
        name: row[:-1] > 0
        for subset in subsets
        for name, row in zip(source.splits[subset].names, scan.pixels[subset], strict=True)
    }
    return presence, source.classes
