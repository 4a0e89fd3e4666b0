"""Names of others are printed as one harmless line."""

from __future__ import annotations

import os

import pytest

from localign.text.printing import csv_cell, plain_mathtext, printable


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("cat.jpg", "cat.jpg"),
        ("größe 猫 🐈‍⬛.jpg", "größe 猫 🐈‍⬛.jpg"),
        (os.fsdecode(b"caf\xe9.jpg"), "caf\\xe9.jpg"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("gpj.\u202eexe", "gpj.\\u202eexe"),
        ("a\u2028b", "a\\u2028b"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(value: str, shown: str) -> None:
    assert printable(value) == shown
    printable(value).encode("utf-8")


@pytest.mark.parametrize("value", ["=1+1", "+cmd", "-2+3", "@SUM(A1)", "=HYPERLINK(1)"])
def test_formulas_are_quoted(value: str) -> None:
    assert csv_cell(value) == f"'{value}"


@pytest.mark.parametrize(("value", "cell"), [(-0.5, "-0.5"), ("-0.5", "-0.5"), ("+3", "+3"), ("cat", "cat")])
def test_numbers_and_words_stay(value: object, cell: str) -> None:
    assert csv_cell(value) == cell


def test_mathtext_is_text() -> None:
    assert plain_mathtext("$\\frac$") == "\\$\\frac\\$"
