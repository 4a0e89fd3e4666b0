"""Progress: what fits on a terminal, and lines where there is none."""

from __future__ import annotations

import re

import pytest

from localign.engine.progress import Bar, progress_bars

ENTRY = {
    "samples": 3,
    "loss": 0.4321,
    "images_per_second": 153.2,
    "grad_norm": 1.25,
    "lr": 1e-4,
    "data_wait": 0.02,
}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, as a list of one number that tests set."""
    now = [100.0]
    monkeypatch.setattr("localign.engine.progress.time.monotonic", lambda: now[0])
    return now


def test_off_a_terminal_a_line_comes_every_thirty_seconds(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    bar = Bar("align", 1000, done=100)
    for _ in range(200):
        clock[0] += 1
        bar.write(ENTRY)
        bar.advance()
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("align 130/1,000 (13%)  images/s 153  loss 0.4321")
    assert lines[0].endswith("0:14:30 left")  # 870 steps at one a second; the 100 before do not count
    assert lines[-1].startswith("align 280/1,000 (28%)")


def test_every_validation_is_a_line_at_once(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar("align", 10)
    bar.advance()
    bar.write(ENTRY)
    assert capsys.readouterr().err == ""
    clock[0] += 2
    bar.write({"step": 1, "val_loss": 0.5, "val_images": 20})
    assert capsys.readouterr().err == "align 1/10 (10%)  val_loss 0.5000  0:00:18 left\n"


def test_a_stage_without_a_known_end_has_no_share(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bars() as update:
        update("reading", 5, 0)
        clock[0] += 31
        update("reading", 9, 10)
    assert capsys.readouterr().err == "reading 9/10 (90%)  0:00:03 left\n"


def shown(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a terminal of this width shows after one step of ten."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(width))
    bar = Bar("vlm train", 10)
    bar.write(ENTRY)
    bar.advance()
    bar.close()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    return text.replace("\r", "\n").strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("width", "numbers", "missing"),
    [
        (50, [], ["images/s", "loss"]),
        (80, ["images/s 153", "loss 0.4321"], ["grad", "data wait"]),
        (100, ["images/s 153", "loss 0.4321", "1/10", "grad 1.25"], ["data wait"]),
        (160, ["images/s 153", "loss 0.4321", "1/10", "grad 1.25", "lr 1.0e-04", "data wait 2%"], []),
    ],
)
def test_a_narrow_terminal_keeps_what_matters(
    width: int,
    numbers: list[str],
    missing: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = shown(width, monkeypatch, capsys)
    assert len(line) <= width
    assert line.startswith("vlm train")
    assert "━" in line
    for text in ("10%", "left", *numbers):
        assert text in line
    assert not [text for text in missing if text in line]


def test_names_are_shown_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    bar = Bar("a[/red]b", 2)
    bar.write({"x[/red]_per_second": 1.0})
    bar.advance()
    bar.close()
    assert "a[/red]b" in capsys.readouterr().err
