"""Cache of the label files found good: the ids in each, by path and state of the file."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from prcl_fast.data.sources.images import READING
from prcl_fast.data.sources.labels import LabelContent, Reading
from prcl_fast.errors import InputError, WriteError
from prcl_fast.files.reading import read_text
from prcl_fast.files.writing import write_text

_VERSION = 3
_MAX_BYTES = 2**28  # a million label files
_log = logging.getLogger(__name__)

# "indices 0:1200:000000 15:80:c08080": the reading, then id, pixels and, for some readings, the colour.
_READINGS = ("grey", "indices", "colours")
_ID = r"(?:\d|[1-9]\d|1\d\d|2[0-4]\d|25[0-5]):[1-9]\d{0,11}(?::[0-9a-f]{6})?"
_CONTENT = re.compile(rf"(?:{'|'.join(_READINGS)})(?: {_ID}){{1,256}}", re.ASCII)


@dataclass(frozen=True)
class Entry:
    """A label file found good: the state of label and image, and the ids in it."""

    stamp: str
    content: LabelContent


def read_entries(file: Path) -> dict[str, Entry]:
    """The stored entries by file and decoder. Any that is damaged is left out: labels can be read again.

    None is taken from a file that belongs to another user, or that any user may write.
    """
    try:
        state = os.stat(file)
        if state.st_uid not in (os.geteuid(), 0) or state.st_mode & 0o002:
            return {}
        tree = json.loads(read_text(file, "cache of labels", _MAX_BYTES))
        if (tree["version"], tree["reading"]) != (_VERSION, READING):
            return {}
        labels = dict(tree["labels"])
    except (OSError, InputError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {key: entry for key, value in labels.items() if (entry := _entry(value)) is not None}


def write_entries(file: Path, entries: Mapping[str, Entry]) -> None:
    """Writes the entries, whole or not at all; a file that cannot be written is reported in the log."""
    labels = {key: [entry.stamp, _text(entry.content)] for key, entry in entries.items()}
    try:
        write_text(file, json.dumps({"version": _VERSION, "reading": READING, "labels": labels}))
    except WriteError as error:  # a read-only home costs time, not the run
        _log.warning("the scan of the labels cannot be kept: %s", error)


def _entry(value: object) -> Entry | None:
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(part, str) for part in value):
        return None
    stamp, text = value
    if len(text) > 8192 or _CONTENT.fullmatch(text) is None:
        return None
    reading, *fields = text.split(" ")
    pixels: dict[int, int] = {}
    colours: dict[int, int] = {}
    for one in fields:
        number, count, *colour = one.split(":")
        pixels[int(number)] = int(count)
        if colour:
            colours[int(number)] = int(colour[0], 16)
    return Entry(stamp, LabelContent(cast("Reading", reading), pixels, colours))


def _text(content: LabelContent) -> str:
    fields = [
        f"{number}:{count}" + (f":{content.colours[number]:06x}" if number in content.colours else "")
        for number, count in content.pixels.items()
    ]
    return " ".join([content.reading, *fields])
