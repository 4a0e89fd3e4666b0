"""File names and names of models are bytes of strangers: no command fails at the end because it shows one."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localign.cli import main

TINY = (
    "--backbone vit_tiny_patch16_224 --weights none "
    "--model-kwargs img_size=24 patch_size=8 embed_dim=24 depth=2 num_heads=2"
)
NAMES = [
    b"caf\xe9.png",
    b"new\nline.png",
    b"\x1b[31mred.png",
    b"=cmd.png",
    b"[/red].png",
    b"$\\frac$.png",
    b"ok.png",
]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder whose own name is not UTF-8 either, with one unreadable image."""
    folder = tmp_path / os.fsdecode(b"pictures\xff")
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name in NAMES:
        Image.fromarray(draw.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(
            folder / os.fsdecode(name), "PNG"
        )
    (folder / os.fsdecode(b"bad\x9b\xfe.png")).write_bytes(b"no image")
    return folder


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """What was printed on a standard output as strict as under en_US.UTF-8."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)

    def text() -> str:
        stream.flush()
        return stream.buffer.getvalue().decode()  # type: ignore[attr-defined, no-any-return]

    return text


def is_harmless(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


def test_images_of_any_name_are_verified(photos: Path, tmp_path: Path, shown: Callable[[], str]) -> None:
    assert main(["data", "verify", str(photos), "--workers", "0", "--out", str(tmp_path / "bad.jsonl")]) == 1
    assert "bad\\x9b\\xfe.png" in shown()
    assert is_harmless(shown())
    (entry,) = map(json.loads, (tmp_path / "bad.jsonl").read_text().splitlines())
    assert os.fsencode(entry["path"]) == b"bad\x9b\xfe.png", "the list names the file itself"


def test_images_of_any_name_are_packed(photos: Path, tmp_path: Path, shown: Callable[[], str]) -> None:
    out = tmp_path / os.fsdecode(b"out\xff")
    assert main(["data", "shard", str(photos), str(out), "--workers", "0"]) == 0
    assert "7 images" in shown() or "8 images" in shown()
    assert is_harmless(shown())
    assert main(["data", "stats", str(out), "--workers", "0", "--out", str(tmp_path / "stats.json")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


@pytest.mark.slow
def test_an_alignment_on_images_of_any_name_ends_with_its_report(
    photos: Path, tmp_path: Path, shown: Callable[[], str]
) -> None:
    out = tmp_path / os.fsdecode(b"run\xff[/red]")
    options = shlex.split(f"{TINY} --steps 2 --batch-size 4 --workers 0 --max-bad-share 1 --device cpu")
    assert main(["align", *options, "--data", str(photos), "--out", str(out)]) == 0
    assert (out / "report.html").is_file()
    assert "skipped    1 unreadable images" in shown()
    assert is_harmless(shown())


@pytest.mark.slow
def test_models_of_any_name_are_probed(tmp_path: Path, shown: Callable[[], str]) -> None:
    names = ["a[/red]b", r"$\frac$", "=1+1", ":smile:"]
    options = shlex.split(
        "--train-scenes 32 --test-scenes 16 --batch-size 8 --steps 4 --heads linear --cache device --device cpu"
    )
    words = ["probe", *(f"{name}=embedded" for name in names), *options, "--out", str(tmp_path / "probe")]
    assert main(words) == 0
    assert all(name in shown() for name in names)
    assert (tmp_path / "probe" / "report.html").is_file()
    rows = list(csv.reader((tmp_path / "probe" / "recalls.csv").open(encoding="utf-8")))
    assert {row[0] for row in rows[1:]} == {"a[/red]b", r"$\frac$", "'=1+1", ":smile:"}
