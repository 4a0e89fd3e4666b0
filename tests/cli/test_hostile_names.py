"""File names and names of models are bytes of strangers: no command fails at the end because it shows one."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localign.cli import main
from localign.options.names import EMBEDDED

TINY = (
    "--backbone vit_tiny_patch16_224 --weights none "
    "--model-kwargs img_size=24 patch_size=8 embed_dim=24 depth=2 num_heads=2"
)
NAMES = [
    b"caf\xe9.png",
    b"new\nline.png",
    b"\x1b[31mred.png",
    b"=cmd.png",
    b"[bold].png",
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


def run(words: list[str]) -> tuple[int, str]:
    """The exit code, and what is printed on a standard output as strict as under en_US.UTF-8."""
    memory = io.BytesIO()
    stream = io.TextIOWrapper(memory, encoding="utf-8", errors="strict")
    with redirect_stdout(stream):
        code = main(words)
    stream.flush()
    return code, memory.getvalue().decode()


def is_harmless(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


def test_images_of_any_name_are_verified(photos: Path, tmp_path: Path) -> None:
    code, shown = run(["data", "verify", str(photos), "--workers", "0", "--out", str(tmp_path / "bad.jsonl")])
    assert code == 1
    assert "bad\\x9b\\xfe.png" in shown
    assert is_harmless(shown)
    (entry,) = map(json.loads, (tmp_path / "bad.jsonl").read_text().splitlines())
    assert os.fsencode(entry["path"]) == b"bad\x9b\xfe.png", "the list names the file itself"


def test_images_of_any_name_are_packed(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / os.fsdecode(b"out\xff")
    code, shown = run(["data", "shard", str(photos), str(out), "--workers", "0"])
    assert code == 0
    assert "8 images" in shown
    assert is_harmless(shown)
    assert run(["data", "stats", str(out), "--workers", "0", "--out", str(tmp_path / "stats.json")])[0] == 0
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.slow
def test_an_alignment_on_images_of_any_name_ends_with_its_report(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / os.fsdecode(b"run\xff[bold]")
    options = shlex.split(f"{TINY} --steps 2 --batch-size 4 --workers 0 --max-bad-share 1 --device cpu")
    code, shown = run(["align", *options, "--data", str(photos), "--out", str(out)])
    assert code == 0
    assert (out / "report.html").is_file()
    assert "skipped    1 unreadable images" in shown
    assert is_harmless(shown)


@pytest.mark.slow
def test_models_of_any_name_are_probed(tmp_path: Path) -> None:
    names = ["a[/red]b", r"$\frac$", "@sum", ":smile:"]
    options = shlex.split(
        "--train-scenes 32 --test-scenes 16 --batch-size 8 --steps 4 --heads linear --cache device --device cpu"
    )
    models = ",".join(f"{name}={EMBEDDED}" for name in names)
    code, shown = run(["probe", models, *options, "--out", str(tmp_path / "probe")])
    assert code == 0
    assert all(name in shown for name in names)
    assert (tmp_path / "probe" / "report.html").is_file()
    rows = list(csv.reader((tmp_path / "probe" / "recalls.csv").open(encoding="utf-8")))
    assert {row[0] for row in rows[1:]} == {"a[/red]b", r"$\frac$", "'@sum", ":smile:"}
