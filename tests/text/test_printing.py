"""Names of others are printed as one harmless line."""

from __future__ import annotations

import os

import pytest

from localign.text.printing import console, csv_cell, plain_mathtext, printable


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


@pytest.mark.parametrize(
    "name",
    ["a[/red]b", "[bold]x", ":smile:", "[link=file:///etc/passwd]y[/link]", "a\x1b[31mb", "n\udcff", "[/]"],
)
def test_tables_show_names_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    table = Table(title=name, caption=name)
    table.add_column(name)
    table.add_row(name)
    console(120).print(table)
    assert capsys.readouterr().out.count(printable(name)) == 4


@pytest.mark.parametrize("name", [r"$\frac$", "$", "a$b$c", r"\$x\$", "$$", "a\n$b$", "$x_{1"])
def test_dollars_are_no_mathematics(name: str) -> None:
    from matplotlib.figure import Figure

    escaped = plain_mathtext(name)
    assert plain_mathtext(escaped) == escaped
    figure = Figure()
    figure.suptitle(escaped)
    figure.draw_without_rendering()
