"""Durations as text."""

from __future__ import annotations


def duration_text(seconds: float) -> str:
    """Such as "250 ms", "12.3 s", "4.5 min", "31 h 39 min" or "3.2 days"."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{seconds / 60:.3g} min"
    hours = round(seconds / 3600)
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours / 24:.1f} days"
