"""Parsers of the commands that also run without Typer."""

from __future__ import annotations

import argparse


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m bench NAME`; its help begins with the description as it is written."""
    return argparse.ArgumentParser(
        prog=f"python -m bench {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
