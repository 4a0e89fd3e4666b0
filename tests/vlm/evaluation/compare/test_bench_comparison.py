"""Comparisons: single models, training seeds, panels, missing benchmarks, tables and charts."""

from __future__ import annotations

import csv
import functools
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_models import ALONE, ScriptedModel, suites

from localign.cli import main, parse
from localign.errors import UserError
from localign.recipes import read_recipe, recipe_names
from localign.statistics.paired import interval_over_seeds
from localign.vlm.benchmarks.pope import POPE
from localign.vlm.evaluation.compare.charts import comparison_drawings
from localign.vlm.evaluation.compare.comparison import Comparison, compare
from localign.vlm.evaluation.compare.panels import ComparedModel, PanelModel, parse_models
from localign.vlm.evaluation.compare.summary import RunSummary, summarise_run
from localign.vlm.evaluation.compare.tables import write_comparison
from localign.vlm.evaluation.results import read_answers, rescore_answers
from localign.vlm.evaluation.run import evaluate

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluations a1, a2, b1, b2, b3 of scripted models on the same questions, and "less" with fewer benchmarks."""
    root = tmp_path_factory.mktemp("scripted")
    asked = suites(root / "data", "refcoco", "gqa", "vqav2", "pope")
    for name in ("a1", "a2", "b1", "b2", "b3"):
        evaluate(ScriptedModel(weights=name), asked, root / name, ALONE, 8, name)
    evaluate(ScriptedModel(), asked[:2], root / "less", ALONE, 8, "less")
    return root


def score(command: str, root: Path, out: Path) -> Comparison:
    """The comparison of folders below a root, from the command line to files."""
    assert main(["vlm", "score", *shlex.split(command.replace("@", f"{root}/")), "--out", str(out)]) == 0
    found: Comparison = json.loads((out / "comparison.json").read_text())
    return found


def refused(capsys: pytest.CaptureFixture[str], command: str) -> str:
    """The single line with which a comparison is refused."""
    capsys.readouterr()
    assert main(["vlm", "score", *shlex.split(command)]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    return said


def results(root: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / name / "results.json").read_text())["benchmarks"]
    return found


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@functools.cache
def summaries(folder: Path) -> dict[str, RunSummary]:
    outcomes = json.loads((folder / "results.json").read_text())["benchmarks"]
    records = read_answers(folder / "answers.jsonl")
    return {
        name: summarise_run(rescore_answers(part, "default", outcomes[name]))
        for name, part in records.items()
    }


def compared(command: str, root: Path) -> Comparison:
    """The same comparison without the command line and without files."""
    models = parse_models(shlex.split(command.replace("@", f"{root}/")))
    return compare([ComparedModel(model, tuple(map(summaries, model.folders))) for model in models])


def compared_model(name: str, *folders: Path) -> ComparedModel:
    return ComparedModel(PanelModel("", "", name, folders), tuple(map(summaries, folders)))


def drawings(comparison: Comparison) -> dict[str, list[dict[str, Any]]]:
    """The data of every chart, by name."""
    drawn, _ = comparison_drawings(comparison)
    return {d.name: [dict(zip(d.header, row, strict=True)) for row in d.rows] for d in drawn}


def defined(interval: list[float] | None) -> list[float]:
    assert interval is not None
    return interval


# -- single models -------------------------------------------------------------------------------------------


def test_models_are_compared(scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = score("@a1 @b1", scripted, tmp_path)
    assert "McNemar" in capsys.readouterr().out
    assert found["panels"] == [{"figure": "", "panel": "", "models": ["a1", "b1"]}]
    one, two = (results(scripted, name) for name in ("a1", "b1"))
    for name, part in found["benchmarks"].items():
        for model, own in (("a1", one), ("b1", two)):
            for figure, outcome in part["outcomes"][model]["figures"].items():
                assert {k: outcome[k] for k in ("value", "interval")} == own[name]["figures"][figure]
                assert outcome["interval_over_seeds"] is None
        for figure, difference in part["differences"]["b1"].items():
            values = [own[name]["figures"][figure]["value"] for own in (one, two)]
            if None in values:  # a curve of a class that does not occur
                assert difference["value"] is None
            else:
                assert difference["value"] == pytest.approx(values[1] - values[0])
    scores = found["z_scores"]["scores"]
    assert {"gqa: accuracy", "pope: accuracy__POPE-final-Accuracy"} <= set(scores["a1"])
    for figure in scores["a1"]:
        pair = sorted([scores["a1"][figure], scores["b1"][figure]])
        assert pair == pytest.approx([0, 0]) or pair == pytest.approx([-1, 1])
    lines = rows(tmp_path / "comparison.csv")
    assert len(lines) == 2 * sum(len(part["figures"]) for part in one.values())
    assert {row["difference"] for row in lines if row["model"] == "a1"} == {""}
    assert {row["against"] for row in lines if row["model"] == "b1"} == {"a1"}
    assert {path.name for path in tmp_path.glob("*.png")} == {"radar.png", "bars.png"}
    in_radar = {
        row["model"]: float(row["value"]) for row in rows(tmp_path / "radar.csv") if row["axis"] == "GQA"
    }
    assert in_radar == pytest.approx(
        {model: own["gqa"]["figures"]["accuracy"]["value"] for model, own in (("a1", one), ("b1", two))}
    )
    markdown = (tmp_path / "comparison.md").read_text()
    assert markdown.startswith("| benchmark | figure | model |")
    assert "over seeds" not in markdown
    assert "- pope: 2 questions in 'adversarial' instead of 3000" in markdown


def test_tests_of_a_comparison_are_right(tmp_path: Path) -> None:
    asked = suites(tmp_path, "vsr")
    truth = {question.id: question.payload["label"] for _, data in asked for question in data.questions}
    for name, right in (("good", 4), ("bad", 1)):  # of four questions
        model = ScriptedModel()
        chosen = {
            q: label if number < right else 1 - label for number, (q, label) in enumerate(truth.items())
        }
        model._numbers = lambda q, n, chosen=chosen: [1.0 - chosen[q.id], chosen[q.id]]  # type: ignore[method-assign,misc]
        evaluate(model, asked, tmp_path / name, ALONE, 3)
    pool = [compared_model(name, tmp_path / name) for name in ("bad", "good")]
    part = compare(pool)["benchmarks"]["vsr"]
    assert part["mcnemar"]["good"] == pytest.approx({"first_better": 0, "second_better": 3, "p_value": 0.25})
    assert part["differences"]["good"]["accuracy__VSR-ExactMatch"]["value"] == 75


def test_mean_z_scores_have_intervals_over_images(scripted: Path) -> None:
    found = compared("@a1 @b1 @b2", scripted)["z_scores"]
    for model, average in found["averages"].items():
        mean = np.mean(list(found["scores"][model].values()))
        assert average["value"] == pytest.approx(mean)
        low, high = defined(average["interval"])
        assert low <= mean <= high
        assert low < high


def test_a_missing_benchmark_is_a_gap(scripted: Path, tmp_path: Path) -> None:
    found = compared("@a1 @less @b1", scripted)
    assert list(found["benchmarks"]) == ["refcoco", "gqa", "vqav2", "pope"]
    assert list(found["benchmarks"]["pope"]["outcomes"]) == ["a1", "b1"]
    assert list(found["benchmarks"]["pope"]["differences"]) == ["b1"]
    assert "pope: not answered by less" in found["notes"]
    write_comparison(tmp_path, found)
    assert (
        "| pope | POPE-final-Accuracy | less | – | – | – | – | – |"
        in (tmp_path / "comparison.md").read_text()
    )
    for data in drawings(found).values():
        assert {row["axis"] for row in data if row["model"] == "less"} == {
            *("RefCOCO", "RefCOCO+", "RefCOCOg", "GQA")
        }


# -- seeds ---------------------------------------------------------------------------------------------------


def test_folders_of_one_name_are_training_seeds(scripted: Path) -> None:
    found = compared("before=@a1 before=@a2 after=@b1 after=@b2", scripted)
    seeds = {
        name: results(scripted, name)["gqa"]["figures"]["accuracy"]["value"]
        for name in ("a1", "a2", "b1", "b2")
    }
    outcome = found["benchmarks"]["gqa"]["outcomes"]["before"]["figures"]["accuracy"]
    assert outcome["seeds"] == [seeds["a1"], seeds["a2"]]
    assert outcome["value"] == pytest.approx((seeds["a1"] + seeds["a2"]) / 2)
    assert outcome["interval_over_seeds"] == pytest.approx(interval_over_seeds([seeds["a1"], seeds["a2"]]))
    difference = found["benchmarks"]["gqa"]["differences"]["after"]["accuracy"]
    gains = [seeds["b1"] - seeds["a1"], seeds["b2"] - seeds["a2"]]
    assert difference["value"] == pytest.approx(sum(gains) / 2)
    assert difference["interval_over_seeds"] == pytest.approx(interval_over_seeds(gains))


def test_an_interval_over_images_is_of_the_mean_over_seeds(scripted: Path) -> None:
    """A second seed with the same answers changes nothing; a seed with other answers changes the interval."""
    shutil.copytree(scripted / "a1", scripted / "again", dirs_exist_ok=True)
    alone, twice, both = (
        compare([compared_model("m", *(scripted / name for name in names))])["benchmarks"]["vqav2"][
            "outcomes"
        ]["m"]
        for names in (("a1",), ("a1", "again"), ("a1", "b1"))
    )
    for figure, found in alone["figures"].items():
        assert twice["figures"][figure]["value"] == pytest.approx(found["value"])
        assert twice["figures"][figure]["interval"] == pytest.approx(found["interval"])
    assert both["figures"]["accuracy"]["interval"] != alone["figures"]["accuracy"]["interval"]


def test_a_pattern_gives_seeds_in_numerical_order(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        (tmp_path / f"seed{number}").mkdir()
    (entry,) = parse_models([f"m={tmp_path}/seed*"])
    assert [folder.name for folder in entry.folders] == ["seed1", "seed2", "seed10"]
    with pytest.raises(UserError, match="no folder matches"):
        parse_models([f"m={tmp_path}/none*"])


def test_more_seeds_of_one_model_are_not_paired(scripted: Path) -> None:
    found = compared("before=@a1 before=@a2 after=@b*", scripted)["benchmarks"]["gqa"]
    assert len(found["outcomes"]["after"]["figures"]["accuracy"]["seeds"]) == 3
    difference = found["differences"]["after"]["accuracy"]
    assert difference["value"] is not None
    low, high = defined(difference["interval_over_seeds"])
    assert low <= difference["value"] <= high
    found = compared("before=@a1 after=@b*", scripted)["benchmarks"]["gqa"]
    assert found["differences"]["after"]["accuracy"]["interval_over_seeds"] is None


def test_a_benchmark_that_some_seed_lacks_does_not_count(scripted: Path) -> None:
    found = compared("a=@a1 b=@b1 b=@less", scripted)
    assert "b" not in found["benchmarks"]["pope"]["outcomes"]
    assert "pope: not answered by all training seeds of b, so it is left out there" in found["notes"]


def test_a_model_alone_has_seeds_but_no_differences(
    scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = score("m=@a1 m=@a2", scripted, tmp_path)
    assert found["benchmarks"]["gqa"]["differences"] == {}
    assert [model["name"] for model in found["models"]["m"]] == ["a1", "a2"]
    said = " ".join(capsys.readouterr().out.split())
    assert "no radar chart: its scales need several models" in said
    assert "over seeds" in said
    assert "McNemar" not in said
    assert not (tmp_path / "radar.png").exists()
    assert (tmp_path / "bars.png").read_bytes().startswith(PNG)


# -- panels --------------------------------------------------------------------------------------------------


def test_panels_have_a_first_model_of_their_own_and_one_scale(scripted: Path) -> None:
    found = compared("C/plain=@a1 C/aligned=@a2 S/plain=@b1 S/aligned=@b2", scripted)
    assert [panel["models"] for panel in found["panels"]] == [
        ["C/plain", "C/aligned"],
        ["S/plain", "S/aligned"],
    ]
    assert set(found["benchmarks"]["gqa"]["differences"]) == {"C/aligned", "S/aligned"}
    values = [
        results(scripted, name)["gqa"]["figures"]["accuracy"]["value"] for name in ("a1", "a2", "b1", "b2")
    ]
    assert found["z_scores"]["means"]["gqa: accuracy"] == pytest.approx(np.mean(values))
    assert found["z_scores"]["deviations"]["gqa: accuracy"] == pytest.approx(np.std(values))
    charts = drawings(found)
    lines = [row for row in charts["radar"] if row["axis"] == "GQA"]
    assert [(row["panel"], row["model"]) for row in lines] == [
        *(("C", "plain"), ("C", "aligned"), ("S", "plain"), ("S", "aligned"))
    ]
    assert [row["value"] for row in lines] == pytest.approx(values)
    assert set(charts) == {"radar", "bars-C", "bars-S"}


def test_a_model_in_two_figures_counts_once(scripted: Path) -> None:
    plain = compared("@a1 @a2 @b1", scripted)["z_scores"]
    comparison = compared(
        "5/CLIP/plain=@a1 5/CLIP/aligned=@a2 12/CLIP/other=@b1 12/CLIP/aligned=@a2", scripted
    )
    found = comparison["z_scores"]
    assert found["means"] == pytest.approx(plain["means"])
    assert found["scores"]["5/CLIP/aligned"] == pytest.approx(plain["scores"]["a2"])
    assert found["scores"]["12/CLIP/aligned"] == found["scores"]["5/CLIP/aligned"]
    assert set(drawings(comparison)) == {"radar-5", "radar-12", "bars-5-CLIP", "bars-12-CLIP"}


def test_the_papers_figures_are_a_recipe() -> None:
    """Every training run of the recipe has its own recipe, and all runs are in one pool."""
    config = parse("vlm score", ["--config", "vlm-figures"])
    entries = parse_models(config.runs)
    assert config.skip_missing
    assert read_recipe("vlm-figures").command == "vlm score"
    assert {entry.figure for entry in entries} == {"figure 5", "figure 11", "figure 12", "figure 13"}
    trained = {folder.name for entry in entries for folder in entry.folders}
    assert {f"vlm/{name}" for name in trained} <= set(recipe_names())
    main_runs = [entry for entry in entries if entry.figure == "figure 5"]
    assert len({entry.panel for entry in main_runs}) == 4
    assert {entry.name for entry in main_runs} == {"baseline MLP", "aligned decoder"}


def test_what_exists_is_drawn_and_what_is_missing_is_named(
    scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rest is as if only that had been asked for."""
    asked = (
        "5/C/plain=@a1 5/C/ours=@none 5/S/plain=@gone 5/S/ours=@a2 5/S/seeds=@b1 5/S/seeds=@b9 5/S/never=@n*"
    )
    found = score(f"{asked} --skip-missing", scripted, tmp_path / "some")
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("missing ")]
    assert lines == [
        f"missing    {scripted}/{folder}: {label}"
        for folder, label in (
            ("none", "5/C/ours"), ("gone", "5/S/plain"), ("b9", "5/S/seeds"), ("n*", "5/S/never"),
        )
    ]  # fmt: skip
    alone = score("5/C/plain=@a1 5/S/ours=@a2 5/S/seeds=@b1", scripted, tmp_path / "alone")
    note = "5/S/plain is missing, so the differences of its panel are to ours"
    assert {**found, "notes": []} == {**alone, "notes": []}
    assert found["notes"] == [*alone["notes"], note]
    for name in ("radar-5.png", "bars-5-C.png", "bars-5-S.png"):
        assert (tmp_path / "some" / name).read_bytes().startswith(PNG)


def test_without_the_option_a_missing_evaluation_is_an_error(
    scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "none/answers.jsonl" in refused(capsys, f"a={scripted}/a1 b={scripted}/none --out {tmp_path}")
    said = refused(capsys, f"a={scripted}/none b={scripted}/gone --skip-missing --out {tmp_path}")
    assert f"nothing to draw: none of 2 evaluations is finished, the first of them {scripted}/none" in said
    assert "no effect with a single folder" in refused(capsys, f"{scripted}/a1 --skip-missing")


def test_one_model_that_exists_is_drawn_alone(scripted: Path, tmp_path: Path) -> None:
    found = score("a=@none b=@a2 --skip-missing", scripted, tmp_path)
    assert found["panels"] == [{"figure": "", "panel": "", "models": ["b"]}]
    assert (tmp_path / "bars.png").read_bytes().startswith(PNG)


def test_models_that_are_not_shown_count_in_the_scales(scripted: Path) -> None:
    shown, others = (
        [compared_model(name, scripted / name) for name in names] for names in (("a1", "a2"), ("b1", "less"))
    )
    whole, part = compare([*shown, *others]), compare(shown, others)
    assert part["z_scores"]["means"] == whole["z_scores"]["means"]
    assert part["z_scores"]["models"]["gqa: accuracy"] == 4
    assert part["z_scores"]["scores"] == {name: whole["z_scores"]["scores"][name] for name in ("a1", "a2")}
    assert part["panels"] == [{"figure": "", "panel": "", "models": ["a1", "a2"]}]
    assert all(set(found["outcomes"]) == {"a1", "a2"} for found in part["benchmarks"].values())
    assert not [note for note in part["notes"] if "less" in note]


# -- charts --------------------------------------------------------------------------------------------------


def test_the_scaling_is_in_the_radars_data(scripted: Path) -> None:
    lines = drawings(compared("@a1 @a2 @b1 @b2", scripted))["radar"]
    by_axis: dict[str, list[dict[str, Any]]] = {}
    for row in lines:
        by_axis.setdefault(row["axis"], []).append(row)
    for models in by_axis.values():
        values = [row["value"] for row in models]
        for row in models:
            assert (row["mean"], row["population_deviation"]) == pytest.approx(
                (np.mean(values), np.std(values))
            )
            if row["population_deviation"] > 0:
                assert row["z"] == pytest.approx((row["value"] - row["mean"]) / row["population_deviation"])
            else:
                assert row["z"] == 0
            assert row["radius"] == pytest.approx(
                row["radius_at_mean"] + row["radius_per_deviation"] * row["z"]
            )
            assert 0 < row["radius"] <= 1
    assert len({(row["radius_at_mean"], row["radius_per_deviation"]) for row in lines}) == 1


def test_fewer_than_three_axes_make_no_radar_chart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = suites(tmp_path / "data", "gqa", "vqav2")
    for name in ("a", "b"):
        evaluate(ScriptedModel(weights=name), asked, tmp_path / name, ALONE, 8, name)
    score("@a @b", tmp_path, tmp_path / "out")
    said = " ".join(capsys.readouterr().out.split())
    assert "no radar chart: it needs at least 3 metrics that several models have, and there are 2;" in said
    assert "; the bar charts show all metrics" in said
    assert {path.name for path in (tmp_path / "out").glob("*.svg")} == {"bars.svg"}


def test_an_axis_of_a_single_model_is_in_the_bar_chart_only(scripted: Path) -> None:
    pool = [compared_model("a", scripted / "a1"), compared_model("b", scripted / "less")]
    (radar, bars), notes = comparison_drawings(compare(pool))
    assert "POPE" not in {row[1] for row in radar.rows}
    assert "POPE" in {row[1] for row in bars.rows}
    assert "POPE is not in the radar chart: only one model has it" in notes


# -- bad use -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("@a1 @a1", "with itself"),
        ("x=@a1 y=@a1", "with itself"),
        ("x=@a1", "a single folder cannot be compared"),
        ("x=@a1 x=@a1/.", "the same folder twice"),
        ("x=@a1 y=@a2 y=@a1", "belongs to two different models, x and y"),
        ("=@a1 @a2", "before the = must stand NAME, PANEL/NAME or FIGURE/PANEL/NAME"),
        ("a/b/c/d=@a1 @a2", "before the = must stand NAME, PANEL/NAME or FIGURE/PANEL/NAME"),
        ("a//b=@a1 @a2", "before the = must stand NAME"),
        ("x= @a2", "there is no folder after the ="),
        ("x=@none* @a2", "no folder matches"),
        ("P/x=@a1 y=@a2", "either all models must be in panels"),
        ("x=@a1 y=@nothing", "there is no file"),
        ("a1=@a2 @a1", "two models have the name a1"),
    ],
)
def test_bad_use_is_one_line(
    command: str, said: str, scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = f" --out {tmp_path / 'out'}"
    assert said in refused(capsys, command.replace("@", f"{scripted}/") + out)
    assert not (tmp_path / "out").exists()


def test_models_of_different_questions_are_not_compared(
    scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limited = suites(tmp_path / "data", "refcoco", limit=1)
    evaluate(ScriptedModel(), limited, tmp_path / "limited", ALONE, 8)
    said = refused(capsys, f"a={scripted / 'a1'} b={tmp_path / 'limited'}")
    assert "refcoco of a and b: the models answered different questions" in said
    assert "different questions" in refused(capsys, f"a={scripted / 'a1'} a={tmp_path / 'limited'}")
    others = suites(tmp_path / "data", "vsr")
    evaluate(ScriptedModel(), others, tmp_path / "others", ALONE, 8)
    said = refused(capsys, f"a={scripted / 'less'} b={tmp_path / 'others'}")
    assert "no benchmark was answered by two of the models" in said


def test_editions_with_the_same_ids_and_other_questions_are_not_compared(
    scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suites(tmp_path / "data", "pope")
    file = tmp_path / "data" / "download" / "pope" / "coco_pope_popular.json"
    file.write_text(file.read_text().replace("Is there", "Can you see", 1))
    other = [(POPE(), POPE().read(tmp_path / "data", allow_partial=True))]
    evaluate(ScriptedModel(), other, tmp_path / "other", ALONE, 8)
    said = refused(capsys, f"a={scripted / 'a1'} b={tmp_path / 'other'}")
    editions = [results(*place)["pope"]["edition"] for place in ((scripted, "a1"), (tmp_path, "other"))]
    assert "different questions under the same ids" in said
    assert f"editions {editions[0]} and {editions[1]}" in said
