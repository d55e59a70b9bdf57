"""Bundled configurations: configs/ of a clone, or its copy in an installed package."""

from __future__ import annotations

import os
from pathlib import Path

from prcl_fast.errors import InputError

NAME = "configs"
_PACKAGE = Path(__file__).resolve().parents[1]


def bundled_folder() -> Path:
    """The folder of the bundled files: in the package, where setup.py puts it, or beside it in a clone."""
    installed = _PACKAGE / NAME
    return installed if installed.is_dir() else _PACKAGE.parent / NAME


def find_config(path: Path, written: Path) -> Path:
    """The file to read: `path` or, where it does not exist, the bundled file that `written` names.

    Args:
        path: relative to the working directory, or absolute.
        written: as given on the command line or in a file, such as configs/demo.yaml.

    Raises:
        InputError: there is no such file.
    """
    try:
        os.lstat(path)
    except FileNotFoundError:
        first, *rest = Path(os.path.normpath(written)).parts or ("",)
        found = bundled_folder().joinpath(*rest)
        if first == NAME and found.is_file():
            return found
        raise InputError(f"{path}: no such configuration file; prcl configs lists the bundled ones") from None
    except (OSError, ValueError):
        pass  # reading it raises the error
    return path
