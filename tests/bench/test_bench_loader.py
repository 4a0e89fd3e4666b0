"""`localign bench loader`: all loaders load the same photographs, and the table shows the measurements."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from localign.bench import loader as bench
from localign.bench import photographs
from localign.bench.loader import PLAIN, LoaderWay, PillowImages
from localign.cli import main
from localign.errors import RunFailure
from localign.options.bench import LoaderBenchConfig

SIDES = (320, 240)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make synthetic photographs small, so that they are drawn and decoded quickly."""
    draw = photographs.draw
    monkeypatch.setattr(photographs, "draw", lambda folder, count, seed: draw(folder, count, seed, SIDES))


def test_synthetic_photographs_differ_and_are_reproducible(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        photographs.draw(tmp_path / name, 6, 3, SIDES)
    files = [sorted((tmp_path / name).iterdir()) for name in ("a", "b")]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    assert len({f.read_bytes() for f in files[0]}) == 6
    for file in files[0]:
        values = np.asarray(Image.open(file)).astype(float)
        assert values.shape == (240, 320, 3)
        assert 20 < values.std() < 80
        steps = np.abs(np.diff(values, axis=0)).mean()
        assert 2 < steps < values.std() / 2  # neither smooth nor noise


def test_the_plain_way_is_normalised_crops(tmp_path: Path) -> None:
    Image.new("L", (90, 70), 128).save(tmp_path / "x.jpg")
    crop = PillowImages(tmp_path, 32)[0]
    assert crop.shape == (3, 32, 32)
    expected = (128 / 255 - torch.tensor(bench._MEAN)) / torch.tensor(bench._STD)
    assert torch.allclose(crop, expected[:, None, None].expand_as(crop), atol=1e-5)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_command_measures_every_way(
    workers: int, small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow")
    options = f"--images 10 --batch-size 4 --image-size 32 --repeats 2 --workers {workers}"
    assert main(["bench", "loader", *options.split(), "--out", str(tmp_path / "b.json")]) == 0
    content = json.loads((tmp_path / "b.json").read_text())
    assert [(row["way"], row["decode"]) for row in content["ways"]] == [
        (PLAIN, "full"),
        *((form, decode) for form in ("folder", "tar", "parquet") for decode in ("scaled", "full")),
    ]
    plain = content["ways"][0]
    assert plain["times_faster"] == {"wall": 1, "cpu": 1}
    for row in content["ways"]:
        for time in ("wall", "cpu"):
            assert row["seconds"][time] > 0
            assert row["images_per_second"][time] * row["seconds"][time] == pytest.approx(8)  # whole batches
            assert row["times_faster"][time] == pytest.approx(plain["seconds"][time] / row["seconds"][time])
    assert 0 < content["mean_difference"] < 3
    assert (content["images"], content["batch_size"], content["size"]) == (10, 4, 32)
    assert content["megapixels"] == pytest.approx(320 * 240 / 1e6)
    shown = " ".join(capsys.readouterr().out.split())
    assert "10 synthetic photographs" in shown
    assert f"{workers or 'no'} workers" in shown


def test_photographs_of_a_folder_are_taken_at_even_distances(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "photographs"
    for i in range(9):
        (source / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60 + i, 50), (i, 0, 0)).save(source / str(i % 2) / f"{i}.png")
    command = ["bench", "loader", "--data", str(source), "--image-size", "8", "--repeats", "1"]
    assert main([*command, "--images", "3", "--out", str(tmp_path / "b.json")]) == 0
    content = json.loads((tmp_path / "b.json").read_text())
    assert content["images"] == content["batch_size"] == 3
    assert content["mean_difference"] == 0  # only JPEG is scaled
    assert "3 photographs of photographs" in capsys.readouterr().out
    (tmp_path / "out").mkdir()
    photographs.copy_from(tmp_path / "out", str(source), 3)
    assert [Image.open(f).width for f in sorted((tmp_path / "out").iterdir())] == [
        60,
        66,
        63,
    ]  # 0/0, 0/6, 1/3
    (source / "0" / "0.png").write_bytes(b"no image")
    assert main(command) == 2
    assert "holds an unreadable image, 0/0.png: not an image" in capsys.readouterr().err


def test_without_pyarrow_parquet_is_left_out(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    content = bench.bench_loader(LoaderBenchConfig(images=2, image_size=16, repeats=1))
    assert {row["way"] for row in content["ways"]} == {PLAIN, "folder", "tar"}


def test_sources_that_disagree_are_a_failure(tmp_path: Path) -> None:
    class Crops:
        def __init__(self, value: int) -> None:
            self.images = torch.full((2, 3, 4, 4), value, dtype=torch.uint8)

    def ways(tar: int) -> list[LoaderWay]:
        values = {("folder", "scaled"): 5, ("folder", "full"): 7, ("tar", "scaled"): 5, ("tar", "full"): tar}
        return [LoaderWay(name, decode, [Crops(value)]) for (name, decode), value in values.items()]  # type: ignore[arg-type]

    assert bench._differences(ways(7)) == 2
    with pytest.raises(RunFailure, match="the folder and the tar shards give different crops, decoded full"):
        bench._differences(ways(8))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("bench loader --device cuda", "unknown option --device"),
        ("bench loader --workers -1", "--workers must not be negative, not -1"),
        ("bench loader --epochs 2", "unknown option --epochs"),
        ("bench loader --image-size 0", "--image-size must be above 0"),
        ("bench loader --data /nonexistent", "there is no folder /nonexistent"),
        ("align --decode half", "--decode takes one of [scaled, full], null, not 'half'"),
        ("align --data scenes --decode full", "--decode has no effect on scenes"),
    ],
)
def test_bad_use_is_one_line(command: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    assert said in capsys.readouterr().err
