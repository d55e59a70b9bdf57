"""`prcl data check CONFIG [key.path=value ...]`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated

import typer

from prcl_fast.cli.arguments import ConfigFile, Overrides
from prcl_fast.errors import InputError

if TYPE_CHECKING:
    from prcl_fast.config import DataConfig
    from prcl_fast.data.source import Source
    from prcl_fast.data.tools.scan import LabelScan

_SHOWN = 20


def check(
    config: ConfigFile,
    overrides: Overrides = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Read the headers of the images, not their pixels.")
    ] = False,
) -> None:
    """Check a data set before training.

    Checked: splits, missing and damaged files, label ids, sizes, class shares. Exit status 2: a file is
    wrong, or training would refuse the labels.
    """
    from prcl_fast.config import load_config
    from prcl_fast.console import counting, print_table, say
    from prcl_fast.data.sources import build_source
    from prcl_fast.data.tools.label_check import judge_labels
    from prcl_fast.data.tools.scan import scan_labels

    data = load_config(config, overrides or ()).data
    source = build_source(data)
    sizes, turned, problems = _read_images(source, fast)
    with counting("read labels") as progress:
        scan = scan_labels(source, workers=_workers(), progress=progress)
    problems += scan.problems
    columns = ["subset", "images", "height x width", "hash", "family", "file"]
    print_table("Images", columns, _subset_rows(data, source, sizes), right=(1,))
    columns = ["id", "class", "labeled, % of pixels", "in images", "val, % of pixels", "in images"]
    print_table("Classes", columns, _class_rows(source, scan), right=(0, 2, 3, 4, 5))
    if turned:
        say(f"note: {turned} images carry an EXIF orientation; it is applied")
    for problem in problems[:_SHOWN]:
        say(f"wrong: {problem}")
    if len(problems) > _SHOWN:
        say(f"wrong: {len(problems) - _SHOWN} more")
    if problems:
        raise InputError(f"{config}: {len(problems)} files are wrong, the first: {problems[0]}")
    verdict = judge_labels(source, scan)
    for note in verdict.notes:
        say(f"note: {note}")
    for refusal in verdict.refusals:
        say(f"wrong: {refusal}")
    if verdict.refusals:
        raise InputError(verdict.refusals[0])
    say("no file is wrong; see the notes" if verdict.notes else "nothing wrong found")


def _read_images(source: Source, fast: bool) -> tuple[dict[str, tuple[int, int]], int, list[str]]:
    """Height and width of every image that can be read, the number of images with an EXIF orientation, and a
    line for each image that cannot be read."""
    from prcl_fast.console import counting
    from prcl_fast.data.sources.file_source import FileSource

    def read(name: str) -> tuple[tuple[int, int], bool] | str:
        try:
            header = source.header(name) if isinstance(source, FileSource) else None
            turned = header is not None and header.orientation > 1
            if fast and header is not None:
                return header[:2], turned
            height, width, _ = source.image(name).shape
            return (height, width), turned
        except InputError as error:
            return str(error)

    names = [name for split in source.splits.values() for name in split.names]
    sizes: dict[str, tuple[int, int]] = {}
    problems: list[str] = []
    count = 0
    with counting("read images") as progress, ThreadPoolExecutor(_workers()) as pool:
        for done, (name, result) in enumerate(zip(names, pool.map(read, names), strict=True), start=1):
            if isinstance(result, str):
                problems.append(result)
            else:
                sizes[name], turned = result
                count += turned
            progress(done, len(names))
    return sizes, count, problems


def _subset_rows(data: DataConfig, source: Source, sizes: dict[str, tuple[int, int]]) -> list[list[str]]:
    rows = []
    for subset, split in source.splits.items():
        if not split.names:
            continue
        file = getattr(data, subset) if data.kind != "synthetic" else None
        found = [sizes[name] for name in split.names if name in sizes]
        rows.append(
            [
                subset,
                str(len(split.names)),
                _size_range(found),
                split.fingerprint,
                split.family,
                str(file or "(generated)"),
            ]
        )
    return rows


def _size_range(sizes: Sequence[tuple[int, int]]) -> str:
    if not sizes:
        return ""
    heights, widths = zip(*sizes, strict=True)
    ranges = (f"{min(v)}" if min(v) == max(v) else f"{min(v)}..{max(v)}" for v in (heights, widths))
    return " x ".join(ranges)


def _class_rows(source: Source, scan: LabelScan) -> list[list[str]]:
    """Share of labeled pixels and number of images of every class; the last row counts unlabeled pixels."""
    rows = []
    for index, name in enumerate([*source.classes, "(not labeled, % of all)"]):
        row = [str(index) if index < len(source.classes) else "255", name]
        for subset in ("labeled", "val"):
            pixels = scan.pixels[subset]
            last = index == len(source.classes)
            total = pixels.sum() if last else pixels[:, :-1].sum()
            share = f"{100 * pixels[:, index].sum() / total:.3f}" if total else "-"
            row += [share, str(int((pixels[:, index] > 0).sum()))]
        rows.append(row)
    return rows


def _workers() -> int:
    return min(8, os.cpu_count() or 1)
