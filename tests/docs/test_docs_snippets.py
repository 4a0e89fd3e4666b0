"""Every Python snippet of README and the site runs, on tiny models and data under the names that it uses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from docs_text import blocks, pages
from PIL import Image
from threads import one_thread  # noqa: F401
from vlm_models import picture, tiny_processor, tiny_vlm

import localign
from localign.cli import main
from localign.vlm.model.build import save_vlm

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
SNIPPETS = [
    pytest.param(code, id=f"{name.removeprefix('docs/')}-{number}")
    for name, text in pages().items()
    for number, code in enumerate(blocks(text, "python"))
]
SMALLER = {
    r'"dino-vit-b"': f'"vit_tiny_patch16_224", weights="none", model_kwargs={TINY}, workers=0',
    r"steps=\d+": "steps=2",
    r"batch_size=\d+": "batch_size=2",
    r"max_new_tokens=\d+": "max_new_tokens=2",
}
"""What a snippet says -> what stands there in the test."""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with photographs, an aligned run, the export of a vision-language model, and features."""
    folder = tmp_path_factory.mktemp("snippets")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "photos").mkdir()
        for number in range(4):
            picture(number, (40, 36)).save(folder / "photos" / f"{number}.png")
        Image.open("photos/0.png").convert("RGB").save("photo.jpg")
        tiny: dict[str, Any] = {
            "weights": "none",
            "model_kwargs": TINY,
            "steps": 1,
            "batch_size": 2,
            "workers": 0,
        }
        localign.align("vit_tiny_patch16_224", data="photos/", out="runs/clip-b", **tiny)
        localign.align("vit_tiny_patch16_224", data="photos/", out="runs/so400m", **tiny)
        model, tokenizer = tiny_vlm()
        for name in ("my-vlm", "runs/vlm/export"):
            save_vlm(model, tiny_processor(model, tokenizer), Path(name))
        assert (
            main(["embed", "photos", "--backbone", "runs/clip-b", "--out", "features.parquet", "--patches"])
            == 0
        )
        yield folder


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 5


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippets_run(code: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm
    import transformers

    monkeypatch.chdir(here)
    for said, stands in SMALLER.items():
        code = re.sub(said, stands, code)
    known = {
        "localign": localign,
        "transformers": transformers,
        "timm": timm,
        "pipeline": transformers.pipeline,
    }
    names: dict[str, Any] = {**known, "images": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}
    exec(compile(code, "<documentation>", "exec"), names)
    if "patches" in names:
        assert names["patches"].shape == (4, 4, 4, 16)
