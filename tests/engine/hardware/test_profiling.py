"""`--profile STEPS` writes a trace and a summary of the largest kernels, and changes nothing else."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from engine_runs import run, same_bits, tiny, weights

from localign.cli import main
from localign.engine.hardware.profiling import FOLDER, SUMMARY, TRACE


def test_a_profiled_run_is_the_same_run(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny(tmp_path / "plain", images, steps=6))
    run(tiny(tmp_path / "profiled", images, steps=6, profile=2))
    assert same_bits(weights(tmp_path / "plain", 6), weights(tmp_path / "profiled", 6))
    assert not (tmp_path / "plain" / FOLDER).exists()
    folder = tmp_path / "profiled" / FOLDER
    assert {path.name for path in folder.iterdir()} == {TRACE, SUMMARY}
    with gzip.open(folder / TRACE) as file:
        trace = json.load(file)
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"ProfilerStep#3", "ProfilerStep#4"} <= names
    assert "ProfilerStep#5" not in names
    text = (folder / SUMMARY).read_text()
    assert text in capsys.readouterr().err
    rows = text.splitlines()
    assert len(rows) == 12, "a heading, ten operations, the sum"
    shares = [float(row.split("%")[0]) for row in rows[1:-1]]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 100.5
    assert any("aten::" in row for row in rows)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_short_run_is_profiled_from_where_it_can(tmp_path: Path, images: Path, steps: int) -> None:
    run(tiny(tmp_path, images, steps=steps, warmup_steps=0, profile=50))
    assert "ms per step" in (tmp_path / FOLDER / SUMMARY).read_text()


def test_the_number_of_steps_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    for value, said in (("0", "--profile must be above 0"), ("99999", "--profile takes at most 1,024")):
        assert main(["align", "--backbone", "vit_tiny_patch16_224", "--data", "x", "--profile", value]) == 2
        assert said in capsys.readouterr().err
