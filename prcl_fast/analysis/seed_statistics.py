"""Mean and standard deviation over seeds, and tables of them."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

MISSING = "-"


@dataclass(frozen=True)
class Summary:
    """n >= 1 values: their mean and sample standard deviation (n - 1 in the denominator; None for n = 1)."""

    mean: float
    std: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.std is None else f"{self.mean:.1f} ± {self.std:.1f}"


def summarize(values: Iterable[float | None]) -> Summary | None:
    """The summary of the values that are not None; None without any."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    std = statistics.stdev(present) if len(present) > 1 else None
    return Summary(statistics.fmean(present), std, len(present))


def cell_texts(column: Sequence[Summary | None], *, bold: str = "**") -> list[str]:
    """The cells of one column; `bold` surrounds the highest mean of several."""
    means = [cell.mean for cell in column if cell is not None]
    texts = []
    for cell in column:
        mark = bold if cell is not None and len(means) > 1 and cell.mean == max(means) else ""
        texts.append(MISSING if cell is None else f"{mark}{cell}{mark}")
    return texts


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, names: int) -> str:
    """A Markdown table; its first `names` columns are text, the others numbers aligned to the right."""
    lines = [header, ["---"] * names + ["---:"] * (len(header) - names), *rows]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def csv_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Comma-separated values; None is an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
