"""The benchmark of answers: drawn files are read and scored alike by both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.answers import OURS, PLAIN, check_equal, measured, write_files
from benchmarks.run import main
from localign.errors import RunFailure


def test_both_ways_score_drawn_answers_alike(tmp_path: Path) -> None:
    predictions = write_files(tmp_path, 600, seed=3)
    (tmp_path / "predictions.json").write_text(json.dumps(predictions))
    ours, plain = (measured(way, str(tmp_path)) for way in (OURS, PLAIN))
    assert ours["scores"].keys() == plain["scores"].keys() == predictions.keys()
    check_equal(ours["scores"], plain["scores"])
    assert 0.6 < sum(ours["scores"].values()) / 600 < 1  # predictions mostly match the majority
    ours["scores"]["7"] += 0.1
    with pytest.raises(RunFailure, match="disagree about the score of question 7"):
        check_equal(ours["scores"], plain["scores"])


@pytest.mark.slow
def test_the_command_measures_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["answers", "--questions", "2000", "--out", str(tmp_path / "b.json")]) == 0
    assert "2,000 questions of VQAv2" in capsys.readouterr().out
    ways = json.loads((tmp_path / "b.json").read_text())["ways"]
    assert [way["way"] for way in ways] == [OURS, PLAIN]
    for way in ways:
        assert way["loading"]["cpu"] > 0
        assert way["scoring"]["cpu"] > 0
        assert way["peak_bytes"] is None or way["peak_bytes"] > 0
