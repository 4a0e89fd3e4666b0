"""A labelled folder for the published worlds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A labelled folder that also has images to align on."""
    for part in ("images/train", "images/val", "masks/train", "masks/val", "imagenet-1k/train", "plain"):
        folder = tmp_path / part
        folder.mkdir(parents=True)
        mode = "L" if part.startswith("masks") else "RGB"
        for i in range(4):
            Image.fromarray(np.full((32, 32), i % 2, np.uint8)).convert(mode).save(folder / f"{i}.png")
    (tmp_path / "classes.json").write_text(json.dumps({"0": "unlabeled", "1": "thing"}))
    return tmp_path
