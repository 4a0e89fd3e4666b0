"""Tables of the paper: our numbers as measured beside the published numbers, and LaTeX that compiles."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from probe_results import outcome

from localign.backbones import CATALOGUE
from localign.errors import UserError
from localign.report import write_table
from localign.report.tables.latex import escape, to_latex
from localign.report.tables.published import TABLE1, TABLE4, TABLE5
from localign.report.tables.rows import Grid
from localign.results import ProbeOutcome, RecallDifference


def rows(**recalls: float) -> dict[str, list[ProbeOutcome]]:
    return {
        f"table1/{slug.replace('_', '-')}": [outcome(local + 0.01 * s, 0.5, seed=s) for s in (0, 1)]
        for slug, local in recalls.items()
    }


def cells(markdown: Path) -> dict[str, list[str]]:
    """The cells of each row, by the row's name."""
    lines = [line for line in markdown.read_text().splitlines() if line.startswith("| ")]
    found = [[c.strip() for c in line.strip("|").split("|")] for line in lines[2:]]
    return {line[1]: line[2:] for line in found}


def test_published_rows_have_the_names_of_the_catalogue() -> None:
    assert list(TABLE5) == list(CATALOGUE) or set(TABLE5) == set(CATALOGUE)
    for row in TABLE5.values():
        for i in range(2):
            assert row.difference[i] == pytest.approx(row.aligned[i] - row.baseline[i], abs=0.0151)
    for table in (TABLE1, TABLE4):
        assert all(row.teacher in table for row in table.values())


def test_our_numbers_stand_as_they_are_measured(tmp_path: Path) -> None:
    paths = write_table(
        "table1", rows(teacher=0.41, clipself=0.35, maskembed_3=0.47), tmp_path, data="scenes"
    )
    assert [p.name for p in paths] == ["table1.md", "table1.tex", "table1.csv"]
    found = cells(paths[0])
    # Seeds 0.47 and 0.48, each with the interval value - 0.01 .. value + 0.02.
    assert found["MaskEmbed, 3 masks (default)"][0] == "47.50 [46.50, 49.50]"
    assert found["MaskEmbed, 3 masks (default)"][2].startswith("+6.00 [")
    assert found["MaskEmbed, 3 masks (default)"][4:] == ["46.32", "54.55"]
    assert found["teacher, not aligned"][2] == "–"
    assert found["CLIPSelf (one crop, averaged features)"][4:] == ["below the teacher"] * 2
    with paths[2].open(newline="") as stream:
        lines = {(r["row"], r["task"]): r for r in csv.DictReader(stream)}
    assert float(lines["clipself", "local"]["macro_recall"]) == pytest.approx(0.355)
    assert float(lines["clipself", "local"]["difference"]) == pytest.approx(-0.06)
    assert lines["maskembed-3", "global"]["published_percent"] == "54.55"


def test_rows_that_were_not_run_show_what_was_published_or_stay_away(tmp_path: Path) -> None:
    found = cells(write_table("table1", rows(teacher=0.41), tmp_path)[0])
    assert found["MaskEmbed, 3 masks (default)"] == ["–"] * 4 + ["46.32", "54.55"]
    assert not any("additive" in name for name in found)
    assert "additive (sum of patch vectors)" in cells(write_table("table1", rows(additive=0.4), tmp_path)[0])


def test_unknown_rows_are_kept_and_rows_of_other_tables_refused(tmp_path: Path) -> None:
    found = cells(write_table("table1", rows(teacher=0.41, my_own=0.5), tmp_path)[0])
    assert found["my-own"][0] == "50.50 [49.50, 52.50]"
    with pytest.raises(UserError, match="no row of table4"):
        write_table("table4", rows(teacher=0.41), tmp_path)
    with pytest.raises(UserError, match="unknown table 'table2'"):
        write_table("table2", {}, tmp_path)


def test_bootstrap_differences_by_row_key(tmp_path: Path) -> None:
    entry: RecallDifference = {
        "name": "table1/clipself", "against": "table1/teacher", "head": "transformer", "task": "local",
        "source": "test", "difference": -0.0612, "interval": [-0.07, -0.05],
    }  # fmt: skip
    paths = write_table(
        "table1", rows(teacher=0.41, clipself=0.35), tmp_path, differences=[entry], note="N.B."
    )
    found = cells(paths[0])
    assert found["CLIPSelf (one crop, averaged features)"][2] == "\u22126.12 [\u22127.00, \u22125.00]"
    text = paths[0].read_text()
    assert "paired bootstrap over images" in text
    assert "N.B." in text


def test_table4_has_two_teachers(tmp_path: Path) -> None:
    made = {
        f"table4/{slug}": [outcome(local, 0.5)]
        for slug, local in {"teacher": 0.4, "in1k-2": 0.45, "clip-teacher": 0.5, "clip-in1k-2": 0.53}.items()
    }
    lines = (tmp_path / "table4.csv", write_table("table4", made, tmp_path))[0]
    with lines.open(newline="") as stream:
        found = {r["row"]: r for r in csv.DictReader(stream) if r["task"] == "local"}
    assert float(found["in1k-2"]["difference"]) == pytest.approx(0.05)
    assert float(found["clip-in1k-2"]["difference"]) == pytest.approx(0.03)
    assert found["in21k-5"]["published_percent"] == "45.96"


def test_table5_pairs_before_and_after_and_takes_backbones_of_ones_own(tmp_path: Path) -> None:
    made = {
        "table5/clip-vit-b-baseline": [outcome(0.4, 0.5)],
        "table5/clip-vit-b": [outcome(0.45, 0.51)],
        "table5/mine-baseline": [outcome(0.3, 0.4)],
        "table5/mine": [outcome(0.35, 0.41)],
    }
    found = cells(write_table("table5", made, tmp_path, data="scenes")[0])
    assert len(found) == len(TABLE5) + 1
    assert next(iter(found)) == "mine"
    assert found["CLIP ViT-B"][0] == "40.00 [39.00, 42.00]"
    assert found["CLIP ViT-B"][2] == "+5.00"
    assert found["CLIP ViT-B"][6:] == ["44.63 → 46.32", "+1.68", "52.61 → 54.55", "+1.94"]
    assert found["mine"][6:] == ["–"] * 4
    assert "only signs and orders compare" in (tmp_path / "table5.md").read_text()


def test_latex_escapes_what_means_something_to_it() -> None:
    assert escape("50 % of_$ {a} & b ^~#") == r"50 \% of\_\$ \{a\} \& b \textasciicircum{}\textasciitilde{}\#"
    assert escape("\u22121.2 ± 3") == r"$-$1.2 $\pm$ 3"
    assert escape("a\\b") == r"a\textbackslash{}b"


def test_latex_has_one_cell_per_column_and_balanced_braces() -> None:
    grid = Grid(("a & b", "50 %"), (("x_1", "1"), ("{", "2")), groups=(1,))
    text = to_latex(grid, "A 5 % caption", "tab:x")
    body = re.findall(r"^(?!%)(.*) \\\\$", text, flags=re.M)
    assert len(body) == 3
    assert all(len(re.findall(r"(?<!\\)&", line)) == 1 for line in body)
    unescaped = re.sub(r"\\[{}]", "", text)
    assert unescaped.count("{") == unescaped.count("}")
    assert text.count("\\midrule") == 2
    assert r"\caption{A 5 \% caption}" in text
