"""`localign reproduce` runs everything that a table or figure needs once, continues interrupted runs, and reports."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import save_file

from localign.alignment import AlignTask
from localign.backbones import create_backbone
from localign.cli import main
from localign.engine.log import read_log
from localign.report.figures.locality import measure_locality
from localign.report.tables.published import TABLE1
from localign.reproduce import TARGETS, run, targets
from localign.reproduce.pieces import Alignment, Probing
from localign.reproduce.worlds import DataScale, open_world

TINY_ALIGN = {
    "steps": 2,
    "batch_size": 4,
    "val_images": 4,
    "scale_images": 8,
    "checkpoint_every": 1,
    "log_every": 1,
}
ALL_TABLE1 = {
    "teacher", "clipself", "clipself-decoder", "additive", "averaging-1", "averaging-3", "maskembed-1",
    "maskembed-3",
}  # fmt: skip


def tiny_world(**changes: Any) -> DataScale:
    """Scenes with runs of two steps."""
    world = open_world("scenes")
    small = {
        "align": {**world.align, **TINY_ALIGN},
        "probe": {"steps": 3, "batch": 4, "curve_images": 0},
        "heads": ("transformer",),
        "scenes": {"train": 16, "test": 16},
    }
    return replace(world, **{**small, **changes})


class Ran:
    """The runs that a command made."""

    def __init__(self) -> None:
        self.alignments: list[str] = []
        self.probings: list[str] = []

    def __len__(self) -> int:
        return len(self.alignments) + len(self.probings)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "open_world", lambda name, quick=False: tiny_world())


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """The runs that a test makes, named by row."""
    seen = Ran()
    align, probe = Alignment.run, Probing.run

    def aligning(self: Alignment) -> None:
        seen.alignments.append(self.label.split(",")[0])
        align(self)

    def probing(self: Probing, *arguments: Any) -> None:
        seen.probings.append(self.label.split(",")[0])
        probe(self, *arguments)

    monkeypatch.setattr(Alignment, "run", aligning)
    monkeypatch.setattr(Probing, "run", probing)
    return seen


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which table 1 has been reproduced."""
    folder = tmp_path_factory.mktemp("reproduce")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "open_world", lambda name, quick=False: tiny_world())
        assert reproduce(folder, "table1") == 0
        yield folder


def reproduce(out: Path, command: str) -> int:
    return main(["reproduce", *shlex.split(command), "--out", str(out), "--device", "cpu"])


# -- table 1, from end to end ----------------------------------------------------------------------------


def test_a_table_has_every_row_with_intervals(out: Path) -> None:
    results = json.loads((out / "scenes" / "table1" / "results.json").read_text())
    assert results["probe"].keys() == ALL_TABLE1
    for (outcome,) in results["probe"].values():
        for task in ("local", "global"):
            low, high = outcome["results"]["test"]["transformer"][task]["macro_recall_interval"]
            assert low <= high
    compared = {(d["name"], d["against"], d["task"]) for d in results["differences"]}
    assert compared == {(n, "teacher", t) for n in ALL_TABLE1 - {"teacher"} for t in ("local", "global")}


def test_differences_are_those_of_the_outcomes(out: Path) -> None:
    results = json.loads((out / "scenes" / "table1" / "results.json").read_text())
    recall = {
        name: outcome["results"]["test"]["transformer"]["local"]["macro_recall"]
        for name, (outcome,) in results["probe"].items()
    }
    for found in (d for d in results["differences"] if d["task"] == "local"):
        assert found["difference"] == pytest.approx(recall[found["name"]] - recall["teacher"])
        low, high = found["interval"]
        assert low <= high


def test_the_table_is_written_with_its_notes(out: Path) -> None:
    text = (out / "scenes" / "table1" / "table1.md").read_text()
    for name in ALL_TABLE1:
        (line,) = [line for line in text.splitlines() if f" {TABLE1[name].label} " in line]
        assert "[" in line, "every row was measured"
    assert "Alignments: 2 steps of 4 images, learning rate 0.001, 1 seed." in text
    assert (
        "Heads: 3 steps of 4 images, trained on the same 16 images for every row and evaluated on 16." in text
    )
    for kind in ("tex", "csv"):
        assert (out / "scenes" / "table1" / f"table1.{kind}").stat().st_size > 0


def test_the_gains_of_every_backbone_are_in_one_table(out: Path, tiny: None) -> None:
    assert reproduce(out, "table5") == 0
    with (out / "scenes" / "backbones.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    recipes = {line["recipe"] for line in lines}
    assert recipes >= {"maskembed", "table1/clipself", "table1/maskembed-3"}
    assert {line["target"] for line in lines} >= {"table1", "table5"}
    keys = [(line["backbone"], line["recipe"], line["head"], line["task"]) for line in lines]
    assert len(keys) == len(set(keys))
    for line in lines:
        before, after = float(line["recall_before"]), float(line["recall_after"])
        assert float(line["difference"]) == pytest.approx(after - before)
        assert float(line["difference_low"]) <= float(line["difference_high"])
        assert (line["backbone"], line["timm_name"], line["quick"]) == ("scenes-vit", "", "False")


def test_a_foreign_table_of_backbones_is_not_replaced(
    tmp_path: Path, tiny: None, ran: Ran, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "backbones.csv").write_text("mine,too\n")
    assert reproduce(tmp_path, "table5") == 2
    assert "`localign reproduce` did not write it" in capsys.readouterr().err
    assert len(ran) == 0


def test_a_second_call_runs_nothing(
    out: Path, tiny: None, ran: Ran, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (out / "scenes" / "table1" / "table1.md").read_text()
    assert reproduce(out, "table1") == 0
    assert len(ran) == 0
    assert "nothing: all runs are done" in capsys.readouterr().out
    assert (out / "scenes" / "table1" / "table1.md").read_text() == before


def test_a_changed_row_is_run_again_and_no_other(
    out: Path, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {**tiny_world().rows, "table1/clipself": {"loss": "mse"}}
    monkeypatch.setattr(run, "open_world", lambda name, quick=False: tiny_world(rows=rows))
    assert reproduce(out, "table1") == 0
    assert (ran.alignments, ran.probings) == (["table1/clipself"], ["table1/clipself"])


@pytest.mark.slow
def test_changed_heads_are_trained_again_on_what_is_aligned(
    out: Path, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = {**tiny_world().probe, "steps": 4}
    monkeypatch.setattr(run, "open_world", lambda name, quick=False: tiny_world(probe=longer))
    assert reproduce(out, "table1") == 0
    assert (len(ran.alignments), len(ran.probings)) == (0, len(ALL_TABLE1))


def test_another_seed_is_run_beside_the_first(out: Path, tiny: None, ran: Ran) -> None:
    assert reproduce(out, "fig7") == 0  # shares its runs with the method's row of table 1
    assert len(ran) == 0
    assert reproduce(out, "fig7 --seeds 2") == 0
    assert (len(ran.alignments), len(ran.probings)) == (1, 2)
    results = json.loads((out / "scenes" / "fig7" / "results.json").read_text())
    assert [o["seed"] for o in results["probe"]["scenes-vit"]] == [0, 1]


@pytest.mark.parametrize("figure", sorted(t for t in TARGETS if t.startswith("fig")))
def test_every_figure_is_drawn(figure: str, out: Path, tiny: None) -> None:
    assert reproduce(out, figure) == 0
    drawn = list((out / "scenes" / figure).glob(f"{figure}*.png"))
    assert drawn
    assert all(path.stat().st_size > 5000 for path in drawn)


def test_figure_9_has_a_trend_and_interventions(out: Path, tiny: None) -> None:
    assert reproduce(out, "fig9") == 0
    results = json.loads((out / "scenes" / "fig9" / "results.json").read_text())
    assert measure_locality(results, "transformer").trend is not None
    heads = results["probe"]["scenes-vit"][0]["results"]["test"]
    assert {"transformer", "transformer-cls-only", "transformer-anonymous"} <= heads.keys()


@pytest.mark.slow
def test_published_runs_go_from_recipes_to_a_figure(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "in1k-vit-t"
    monkeypatch.setitem(TARGETS, "fig4", replace(TARGETS["fig4"], rows=targets.pairs(name)))
    short = replace(
        open_world("coco", quick=True),
        align={"steps": 2, "batch_size": 2, "epochs": None, "warmup_epochs": None, "scale_images": 2},
        probe={"steps": 2, "batch": 2, "curve_images": 0},
    )
    monkeypatch.setattr(run, "open_world", lambda world, quick=False: short)
    weights = tmp_path / "weights"
    weights.mkdir()
    random = create_backbone(name, weights="none").vit.state_dict()
    save_file({k: v.contiguous() for k, v in random.items()}, weights / f"{name}.safetensors")
    data = f"--data {photographs} --train-data {photographs} --weights {weights} --workers 0"
    assert reproduce(tmp_path / "out", f"fig4 --world coco {data}") == 0
    results = json.loads((tmp_path / "out" / "coco" / "fig4" / "results.json").read_text())
    assert results["probe"].keys() == {name, f"{name}-baseline"}
    (run_folder,) = (tmp_path / "out" / "coco" / "align").iterdir()
    saved = yaml.safe_load((run_folder / "config.yaml").read_text())["config"]
    assert (saved["soft_cap"], saved["lr"], saved["crop"]) == (30, 3e-4, "published")


def test_a_plan_alone_runs_and_writes_nothing(
    tmp_path: Path, tiny: None, ran: Ran, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce(tmp_path / "new", "table5 --dry-run") == 0
    assert len(ran) == 0
    assert not (tmp_path / "new").exists()
    text = capsys.readouterr().out
    assert "1 alignments (2 steps), 2 probings (6 steps)" in text
    assert text.count("missing") == 3


def test_an_interrupted_alignment_is_continued(
    tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    assert reproduce(whole, "table5") == 0
    step = AlignTask.step

    def interrupted(task: Any, model: Any, batch: Any) -> Any:
        if int(batch.positions[0]) >= TINY_ALIGN["batch_size"]:  # the second step
            raise KeyboardInterrupt
        return step(task, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(AlignTask, "step", interrupted)
        assert reproduce(tmp_path / "interrupted", "table5") == 1
    capsys.readouterr()
    assert reproduce(tmp_path / "interrupted", "table5") == 0
    assert "at step 1" in capsys.readouterr().out
    (run_folder,) = (tmp_path / "interrupted" / "scenes" / "align").iterdir()
    assert [e["step"] for e in read_log(run_folder) if "loss" in e] == [1, 2]
    tables = [(f / "scenes" / "table5" / "table5.csv").read_text() for f in (whole, tmp_path / "interrupted")]
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("", "no target given; choose one of table1, table4"),
        ("tabel1", "unknown target 'tabel1'; did you mean 'table1'"),
        ("table1 --world mars", "--world takes one of [scenes, coco, ade20k, llava], not 'mars'"),
        ("table1 --world coco", "--world coco needs --data DIR"),
        ("table1 --world coco --data {photos}", "table1 needs --train-data DIR"),
        ("table1 --world coco --data {photos}/none", "there is no folder"),
        ("table1 --world coco --data {photos} --train-data {photos}/none", "there is no folder"),
        ("table1 --world coco --data {photos} --weights {photos}/none", "--weights: there is no folder"),
        ("table1 --data {photos}", "--data needs --world coco or ade20k"),
        ("table1 --seeds 0", "--seeds must be at least 1"),
    ],
)
def test_bad_use_is_one_line(
    command: str, said: str, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce(tmp_path / "out", command.format(photos=photographs)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "out").exists()
