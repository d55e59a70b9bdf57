"""The console of every command: it shows names of files, classes and runs as they are."""

from __future__ import annotations

from typing import IO, Any

from rich.console import Console
from rich.text import Text

from prcl_fast.console.text import printable


class PlainConsole(Console):
    """A console for strings that are text: no markup, no emoji codes, no highlighting, no folded lines.

    Brackets and colons in a name are shown as they are. A control character is escaped, so that a string
    stays one line.

    Args:
        stderr: standard error, not standard output.
        quiet: prints nothing.
        width: columns; None: those of the terminal.
        file: written to in place of both.
        terminal: whether it is one; None: by the stream.
    """

    def __init__(
        self,
        *,
        stderr: bool = False,
        quiet: bool = False,
        width: int | None = None,
        file: IO[str] | None = None,
        terminal: bool | None = None,
    ) -> None:
        super().__init__(
            stderr=stderr,
            quiet=quiet,
            width=width,
            file=file,
            force_terminal=terminal,
            markup=False,
            emoji=False,
            highlight=False,
            soft_wrap=True,
        )

    def render_str(self, text: str, **options: Any) -> Text:
        """The text of a string that is printed, or of a table's cell."""
        return super().render_str(printable(text), **options)
