"""A chat draws boxes beside the image, and never over a picture of somebody else."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from localign.files.output import png_mark
from localign.vlm.chat import drawing_path


def draw(path: Path, kind: str | None) -> None:
    Image.new("RGB", (8, 8)).save(path, format="PNG", pnginfo=None if kind is None else png_mark(kind))


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({}, "cat-boxes.png"),
        ({"cat-boxes.png": "vlm chat"}, "cat-boxes.png"),
        ({"cat-boxes.png": None}, "cat-boxes-2.png"),
        ({"cat-boxes.png": "vlm show"}, "cat-boxes-2.png"),
        ({"cat-boxes.png": None, "cat-boxes-2.png": "vlm chat"}, "cat-boxes-2.png"),
        ({"cat-boxes.png": None, "cat-boxes-2.png": None}, "cat-boxes-3.png"),
    ],
)
def test_only_drawings_of_a_chat_are_replaced(
    tmp_path: Path, there: dict[str, str | None], expected: str
) -> None:
    for name, kind in there.items():
        draw(tmp_path / name, kind)
    assert drawing_path(tmp_path / "cat.jpg").name == expected


def test_a_folder_or_a_dangling_link_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "cat-boxes.png").mkdir()
    (tmp_path / "cat-boxes-2.png").symlink_to("nowhere")
    assert drawing_path(tmp_path / "cat.jpg").name == "cat-boxes-3.png"
