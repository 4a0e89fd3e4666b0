"""`localign list`: tables for people, JSON for programs."""

from __future__ import annotations

import json

import pytest

from localign.backbones import CATALOGUE, EMBEDDED
from localign.cli import main
from localign.data.scenes import SceneConfig
from localign.recipes import read_recipe, recipe_names


def listed(capsys: pytest.CaptureFixture[str], what: str) -> list[dict[str, object]]:
    """What `localign list WHAT --json` prints, all of it JSON."""
    assert main(["list", what, "--json"]) == 0
    written = capsys.readouterr()
    assert written.err == ""
    rows: list[dict[str, object]] = json.loads(written.out)
    return rows


def test_backbones_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = {row["name"]: row for row in listed(capsys, "backbones")}
    assert list(found) == [EMBEDDED, *CATALOGUE]
    assert found[EMBEDDED]["image_size"] == SceneConfig().image_size
    assert found["clip-vit-l-336px"] == {
        "name": "clip-vit-l-336px", "timm_name": "vit_large_patch14_clip_quickgelu_336.openai", "image_size": 336,
        "lr": 2e-4, "soft_cap": True, "data": "IN21k", "epochs": 5, "loader": "timm",
    }  # fmt: skip


def test_recipes_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = {row["name"]: row for row in listed(capsys, "recipes")}
    assert list(found) == recipe_names()
    recipe = read_recipe("align/clip-vit-b")
    assert found["align/clip-vit-b"] == {
        "name": "align/clip-vit-b", "command": "align", "about": recipe.about, "options": recipe.values,
    }  # fmt: skip
