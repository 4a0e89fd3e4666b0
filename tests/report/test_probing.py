"""The files of a probing run exist, parse, and hold the numbers of its results."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from probe_results import class_list, pictures, results, twenty_pairs

from localign.errors import UserError
from localign.report import build_report, write_figure, write_probe_report
from localign.report.figures.locality import locality_grid, measure_locality
from localign.report.figures.views import Views
from localign.report.tables.probe import comparison_table, recall_grid
from localign.results import Metrics, Results


def write(folder: Path, content: Results, arrays: dict[str, Any] | None = None) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content))
    if arrays:
        np.savez(folder / "pictures.npz", **arrays)
    return write_probe_report(folder)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results, list[Path]]:
    folder = tmp_path_factory.mktemp("two")
    content = results({"tiny": (0.4, 0.5), "run/export": (0.45, 0.52)}, seeds=2)
    return folder, content, write(folder, content, pictures(["tiny", "run/export"], class_list(10)))


def test_every_file_exists_and_parses(two: tuple[Path, Results, list[Path]]) -> None:
    folder, _, paths = two
    names = {str(p.relative_to(folder)) for p in paths}
    figures = ("before_after", "heads", "classes", "sizes", "locality", "interventions", "predictions")
    assert {f"figures/{n}.png" for n in figures} <= names
    assert {f"figures/{n}.csv" for n in figures} <= names
    assert {"recalls.csv", "classes.csv", "sizes.csv", "tables/recall.md", "tables/comparison.tex"} <= names
    for path in paths:
        assert path.stat().st_size > 50, path
        if path.suffix == ".png":
            with Image.open(path) as picture:
                grey = np.asarray(picture.convert("L"))
                assert int(grey.max()) - int(grey.min()) > 100
        if path.suffix == ".csv":
            rows = table(path)
            assert rows, path
            assert all(None not in row and None not in row.values() for row in rows), path


def test_csv_holds_every_number_in_full(two: tuple[Path, Results, list[Path]]) -> None:
    folder, content, _ = two
    recalls = table(folder / "recalls.csv")
    assert len(recalls) == 2 * 2 * 5 * 2  # backbones, seeds, heads, tasks
    for row in recalls:
        run = content["probe"][row["backbone"]][int(row["seed"])]
        cell = run["results"]["test"][row["head"]][row["task"]]
        assert float(row["macro_recall"]) == cell["macro_recall"]
        assert [float(row["macro_recall_low"]), float(row["macro_recall_high"])] == cell[
            "macro_recall_interval"
        ]
    classes = table(folder / "classes.csv")
    assert len(classes) == len(recalls) * 10
    assert [r["recall"] for r in classes if r["class_id"] == "9"] == [""] * len(recalls)
    assert len(table(folder / "sizes.csv")) == len(recalls) * 10


def test_figures_say_in_numbers_what_they_draw(two: tuple[Path, Results, list[Path]]) -> None:
    folder, _, _ = two
    rows = table(folder / "figures" / "before_after.csv")
    local = {r["backbone"]: r for r in rows if r["panel"].startswith("local")}
    assert float(local["tiny"]["macro_recall"]) == pytest.approx(0.395)
    assert float(local["run/export"]["difference"]) == pytest.approx(0.05)
    assert local["run/export"]["difference_over"] == "seeds"


def test_what_is_missing_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = results({"one": (0.4, 0.5)}, heads=("linear",), interval=False)
    del content["probe"]["one"][0]["results"]["test"]["linear"]["global"]
    paths = write(tmp_path, content)
    drawn = {p.stem for p in paths if p.suffix == ".png"}
    assert drawn == {"before_after", "sizes"}
    said = capsys.readouterr()
    for what in (
        "by head",
        "gains by class",
        "local against global",
        "interventions",
        "relative locality",
        "predictions",
    ):
        assert what in said.out + said.err, what


def test_none_and_nan_do_not_stop_the_rest(tmp_path: Path) -> None:
    content = results(
        {"a": (0.4, 0.5), "b": (0.5, 0.6), "c": (0.5, 0.61)}, seeds=2, heads=("transformer", "mlp")
    )
    for head, value in (("transformer", None), ("mlp", float("nan"))):
        cell = content["probe"]["b"][0]["results"]["test"][head]["local"]
        cell |= {"macro_recall": value, "macro_recall_interval": None, "class_recall": [value] * 10}
    stems = {p.name for p in write(tmp_path, content)}
    assert {"before_after.png", "classes-b.png", "classes-c.png", "locality.png"} <= stems
    rows = {r["label"]: r for r in table(tmp_path / "figures" / "heads.csv") if r["panel"] == "MLP head"}
    assert (rows["b"]["seeds"], rows["c"]["seeds"]) == ("1", "2")


def test_a_folder_without_probing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"command": "align"}')
    with pytest.raises(UserError, match="no results of probing"):
        write_probe_report(tmp_path)


def test_tables_equal_the_results() -> None:
    content = results({"x-baseline": (0.4321, 0.5), "x": (0.5, 0.6)})
    grid = recall_grid(content)
    assert grid.header[1] == "local, transformer head"
    assert [row[:2] for row in grid.rows] == [
        ("x, before", "43.2 [42.2, 45.2]"),
        ("x, after", "50.0 [49.0, 52.0]"),
    ]
    content["differences"] = [
        {"name": "x", "against": "x-baseline", "head": "transformer", "task": "local", "source": "test",
         "difference": 0.0679, "interval": [0.05, 0.08]}
    ]  # fmt: skip
    caption, compared = comparison_table(content)
    assert "paired bootstrap over images" in caption
    assert compared.rows == (("x", "43.2", "50.0", "+6.8 [+5.0, +8.0]", "50.0", "60.0", "+10.0"),)


def test_published_numbers_stand_beside_ours_on_coco_alone() -> None:
    pair = {"clip-vit-b-baseline": (0.4, 0.5), "clip-vit-b": (0.5, 0.6)}
    grid = comparison_table(results(pair, classes=183, heads=("transformer",)))[1]
    assert grid.header[-2:] == ("published local", "published global")
    assert grid.rows[0][-2:] == ("44.63 → 46.32", "52.61 → 54.55")
    assert "published local" not in comparison_table(results(pair))[1].header


def test_relative_locality_of_the_backbones_that_made_the_trend_sums_to_zero() -> None:
    found = measure_locality(results(twenty_pairs()), "transformer")
    assert len(found.fitted) == 10
    assert all(name.endswith("-baseline") for name in found.fitted)
    values = [found.relative(p) for p in found.points if p.backbone in found.fitted]
    assert sum(v for v in values if v is not None) == pytest.approx(0, abs=1e-9)
    assert len(locality_grid(found).rows) == 20


def test_the_page_has_the_figures_and_tables(two: tuple[Path, Results, list[Path]]) -> None:
    folder, _, _ = two
    content = build_report(folder).read_text(encoding="utf-8")
    assert content.count("<img ") == 7
    assert set(re.findall(r'src="(data:image/[a-z+]*)', content)) == {"data:image/png", "data:image/svg+xml"}
    assert "run/export" in content
    assert "Local macro recall (transformer head): tiny 39.5" in content
    assert "95\u00a0% interval" in content


def test_figures_of_the_paper_by_name(tmp_path: Path) -> None:
    content = results({"x-baseline": (0.4, 0.5), "x": (0.5, 0.6)}, kinds=True)
    for name, files in {
        "fig4": {"fig4.png", "fig4.svg", "fig4.csv"},
        "fig7": {"fig7.png", "fig7.svg", "fig7.csv"},
        "fig9": {
            f"fig9-{part}.{kind}" for part in ("locality", "interventions") for kind in ("png", "svg", "csv")
        },
    }.items():
        assert {p.name for p in write_figure(name, content, tmp_path)} == files
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 40, 40), dtype=np.uint8)
    views = Views(images, (10, 10), {"all": np.ones((2, 2, 100), dtype=bool)}, [[(0, 0, 4, 4)]] * 2)
    assert {p.name for p in write_figure("fig10", {}, tmp_path, views=views)} == {"fig10.png", "fig10.csv"}
    with pytest.raises(UserError, match="hold no data"):
        write_figure("fig3", content, tmp_path)
    np.savez(tmp_path / "pictures.npz", **pictures(["x-baseline", "x"], class_list(10)))
    assert {p.name for p in write_figure("fig3", content, tmp_path)} == {"fig3.png", "fig3.csv"}
    with pytest.raises(UserError, match="unknown figure 'fig5'"):
        write_figure("fig5", content, tmp_path)


def test_codes_of_a_majority_label_are_not_called_classes(tmp_path: Path) -> None:
    content = results({"a": (0.4, 0.5)}, heads=("linear",))
    cell: Metrics = {"macro_recall": 0.3, "class_recall": [0.1, None, 0.2], "class_positives": [5, 0, 6]}
    content["probe"]["a"][0]["results"]["test"]["linear"] = {"majority": cell}
    write(tmp_path, content)
    assert [r["class"] for r in table(tmp_path / "classes.csv")] == ["code 0", "code 1", "code 2"]
