"""`prcl configs [DIR]`."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from prcl_fast.console import print_table, say
from prcl_fast.errors import InputError
from prcl_fast.files.writing import replacing_folder

_WIDTH = 90


def configs_command(
    out: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="Folder to copy them to; it must be new or empty."),
    ] = None,
) -> None:
    """List the bundled configurations, or copy them to DIR.

    `prcl train` and the other commands read a bundled file by the name listed, wherever they are started.
    """
    from prcl_fast.config.bundled import NAME, bundled_folder

    folder = bundled_folder()
    if out is not None:
        _copy(folder, out)
        say(f"written: {out}")
        return
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.yaml"))
    rows = [(str(Path(NAME) / file), _title(folder / file)) for file in files]
    print_table(f"{len(rows)} configurations in {folder}", ["file", "description"], rows)


def _title(path: Path) -> str:
    """The first line of the comment at the top of a file; empty where there is none."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# yaml-language-server"):
            return textwrap.shorten(line.removeprefix("# "), _WIDTH, placeholder=" ...")
    return ""


def _copy(folder: Path, out: Path) -> None:
    with replacing_folder(out) as temporary:
        try:
            shutil.copytree(folder, temporary, dirs_exist_ok=True)
        except shutil.Error as error:  # the errors of all files
            raise InputError(f"{out}: cannot be written: {error.args[0][0][2]}") from None
