"""Names and texts of others, made safe to print: file names are bytes, and a terminal obeys what it is sent."""

from __future__ import annotations

import unicodedata

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
    """Text for a figure: Matplotlib shows dollar signs instead of reading mathematics between them."""
    return printable(value).replace("$", r"\$")
