"""Names and texts of others, made safe to print: file names are bytes, and a terminal obeys what it is sent."""

from __future__ import annotations

import re
import sys
import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_KEPT = " \u200c\u200d"
"""The space, and the joiners that scripts and emoji need."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def printable(value: object) -> str:
    """A name or text as one line that is safe on a terminal, in a log and in a report.

    Control characters, line ends, bytes that are not UTF-8, and characters that change the direction of the text are
    escaped: ``\\n``, ``\\x1b``, ``\\u202e``. Everything else stays as it is.
    """
    text = str(value)
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if _is_safe(c) else _escaped(c) for c in text)


def _is_safe(character: str) -> bool:
    return character in _KEPT or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as the operating system's names carry it
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def console(width: int | None = None, *, stderr: bool = False) -> Console:
    """A rich console that shows text as it is: no markup, no emoji codes, and names as :func:`printable` ones.

    Args:
        width: Columns where the output is not a terminal; default those that rich finds.
        stderr: Write to standard error.
    """
    from rich.console import Console  # here, because help and error lines need no tables

    class PlainConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str("\n".join(map(printable, text.split("\n"))), **options)

    stream = sys.stderr if stderr else sys.stdout
    is_terminal = stream is not None and stream.isatty()
    return PlainConsole(width=None if is_terminal else width, stderr=stderr, markup=False, emoji=False)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, :func:`printable`, or the error's class if it has none."""
    lines = str(error).strip().splitlines()
    return printable(lines[0]) if lines else type(error).__name__


def csv_cell(value: object) -> str:
    """A cell of a CSV file. Text that a spreadsheet would run as a formula gets a leading apostrophe."""
    text = printable(value)
    is_number = not isinstance(value, str)
    return f"'{text}" if text.startswith(_FORMULA) and not is_number and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def plain_mathtext(value: object) -> str:
    """Text for a figure: Matplotlib shows dollar signs instead of reading mathematics between them.

    Text that has been through this function stays as it is.
    """
    return re.sub(r"(?<!\\)\$", r"\\$", printable(value))
