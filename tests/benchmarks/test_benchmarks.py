"""The benchmarks compare implementations that agree, and report what they measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import labels as bench_labels
from benchmarks import objectives, scaling
from benchmarks.config import ScalingConfig
from benchmarks.run import BENCHMARKS, main
from localign.errors import RunFailure
from localign.probing import PatchLabels, reduce_labels


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_help_names_the_script(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python benchmarks/run.py {name} ")


def test_the_loops_reduce_labels_as_the_package_does() -> None:
    maps = bench_labels.drawn_maps(2, 40, seed=3)
    maps[0, :14, :14] = 0
    maps[1, :7] = 0
    ours = reduce_labels(maps, 14, bench_labels.CLASSES)
    for loop in (bench_labels.torch_loop, bench_labels.numpy_loop):
        plain = loop(maps, 14, bench_labels.CLASSES)
        for part in ("patch", "image", "majority"):
            assert torch.equal(getattr(plain, part), getattr(ours, part)), (loop, part)


def test_drawn_maps_have_regions_and_borders() -> None:
    maps = bench_labels.drawn_maps(3, 384, seed=0)
    again = bench_labels.drawn_maps(3, 384, seed=0)
    assert torch.equal(maps, again)
    for label_map in maps:
        assert 2 <= len(torch.unique(label_map)) <= bench_labels.CLASSES_PER_IMAGE
        assert 0.002 < float((label_map[:, 1:] != label_map[:, :-1]).float().mean()) < 0.2
    several = reduce_labels(maps, 14, bench_labels.CLASSES).patch.sum(-1) > 1
    assert 0.15 < float(several.float().mean()) < 0.35  # of photographs about 0.18


def test_bench_labels_writes_what_it_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "bench.json"
    assert main(["labels", "--images", "2", "--image-size", "64", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert [row["way"] for row in content["ways"]] == [
        "loop of torch.unique",
        "loop of numpy.unique",
        "reduce_labels",
    ]
    assert content["ways"][2]["times_slower"] == {"wall": 1, "cpu": 1}
    assert content["ways"][0]["times_slower"]["cpu"] > 1
    shown = capsys.readouterr().out
    assert "2 label maps of 64 pixels, patches of 14, 183 classes" in shown
    assert str(out) in shown


def test_bench_labels_takes_a_folder_of_label_maps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        ids = np.random.default_rng(i).integers(0, 9, (6, 8), dtype=np.uint8).repeat(9, 0).repeat(9, 1)
        Image.fromarray(ids).save(tmp_path / f"{i}.png")
    command = ["labels", "--image-size", "48", "--patch-size", "16", "--data", str(tmp_path)]
    assert main([*command, "--out", str(tmp_path / "b.json")]) == 0
    assert json.loads((tmp_path / "b.json").read_text())["classes"] == 9
    (tmp_path / "0.png").write_text("no image")
    assert main(command) == 2
    assert "cannot read the label map" in capsys.readouterr().err


def test_ways_that_disagree_are_a_failure() -> None:
    maps = bench_labels.drawn_maps(1, 28, seed=0)
    ours = reduce_labels(maps, 14, bench_labels.CLASSES)
    other = PatchLabels(~ours.patch, ours.image, ours.majority, ours.codes)
    with pytest.raises(RunFailure, match="disagree about patch labels"):
        bench_labels._check_equal("loop", other, ours)


@pytest.mark.slow
def test_bench_probe_shows_equal_recalls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    assert main(["probe", "--images", "32", "--epochs", "1", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    one_pass = ["one pass, no cache", "one pass, in memory", "one pass, on the disk"]
    assert [row["way"] for row in content["ways"]] == ["plain runs", "runs of the suite", *one_pass]
    assert len(content["recalls"]) == 6
    for row in content["recalls"]:
        for way in ("plain runs", "one pass, no cache"):
            assert row[way] == pytest.approx(row["runs of the suite"], abs=1e-3), way
        assert row["one pass, in memory"] == row["one pass, on the disk"]
        assert row["one pass, in memory"] == pytest.approx(
            row["plain runs"], abs=0.05
        )  # rounding to bfloat16
        assert row["scatter"] >= 0
    assert "6 heads on scenes-vit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            "cats",
            "unknown benchmark 'cats'; the benchmarks are labels, probe, vlm, objectives, answers, scaling",
        ),
        ("answers --device cuda", "unknown option --device"),
        ("answers --images 3", "unknown option --images"),
        ("answers --questions 0", "--questions must be above 0"),
        ("scaling --repeats 2", "unknown option --repeats"),
        ("scaling --batch-size 6", "--batch-size must be a multiple of 4"),
        ("scaling --questions 6", "unknown option --questions"),
        ("labels --epochs 2", "unknown option --epochs"),
        ("probe --patch-size 14", "unknown option --patch-size"),
        ("labels --images 0", "--images must be above 0"),
        ("labels --data x --images 3", "with --data all maps of the folder are used"),
        ("labels --data /nonexistent", "no label maps (*.png) in the folder /nonexistent"),
        ("labels --image-size 8 --images 1", "maps of 8 pixels hold no patch of 14"),
    ],
)
def test_bad_use_is_one_line(command: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_bench_scaling_measures_what_was_foreseen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    command = [
        "scaling",
        "--image-size",
        "32",
        "--batch-size",
        "4",
        "--steps",
        "3",
        "--device",
        "cpu",
    ]
    assert main([*command, "--out", str(out)]) == 0
    cases = json.loads(out.read_text())["cases"]
    shapes = [(row["ranks"], row["images"], row["tokens"]) for row in cases]
    assert shapes == [(1, 4, 4), (2, 4, 4), (4, 4, 4), (1, 8, 4), (1, 16, 4), (1, 4, 16)]
    assert all(row["cpu_seconds"] > 0 and row["wall_seconds"] > 0 for row in cases)
    if Path("/proc/net/dev").is_file():
        for row in cases[1:3]:
            # No upper bound: whatever runs beside this test may use the network too.
            assert row["sent_bytes"] > 0.9 * row["foreseen_bytes"]
    assert "patches/image" in capsys.readouterr().out


def test_bench_scaling_leaves_out_ranks_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    wanted = scaling.cases(ScalingConfig())
    possible, left_out = scaling.fitting(wanted, torch.device("cuda", 0))
    assert [case.ranks for case in possible] == [1, 1, 1, 1]
    assert left_out == ["2 ranks need 2 GPUs; there is 1", "4 ranks need 4 GPUs; there is 1"]
    assert scaling.fitting(wanted, torch.device("cpu")) == (wanted, [])


@pytest.mark.slow
def test_bench_objectives_measures_each_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = "--steps 1 --batch-size 4 --train-scenes 40 --test-scenes 24 --probe-steps 3 --device cpu"
    command = [
        "objectives",
        "--out",
        str(tmp_path / "found.json"),
        "--objectives",
        "[maskembed,plus]",
        *small.split(),
    ]
    assert main(command) == 0
    rows = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "found").glob("*.json")}
    assert rows.keys() == {"teacher-seed0-val", "maskembed-seed0-val", "plus-seed0-val"}
    assert rows["plus-seed0-val"]["pooled cosine"] > 0.5  # one step away from the teacher
    assert rows["teacher-seed0-val"].keys() < rows["plus-seed0-val"].keys()
    monkeypatch.setattr(objectives, "_measured", None)  # finished runs are read
    assert main(command) == 0
    assert "plus seed 0: local transformer" in capsys.readouterr().err
    assert json.loads((tmp_path / "found.json").read_text())["differences"].keys() == {"maskembed", "plus"}
    assert main(["objectives", "--objectives", "[minus]"]) == 2
    assert "unknown objective minus; known: maskembed, readout" in capsys.readouterr().err
