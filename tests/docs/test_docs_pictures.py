"""Pictures of the documentation: the architecture is that of the imports, the similarity that of two models."""

from __future__ import annotations

from pathlib import Path

import docs_pictures
import numpy as np
import pytest
import torch
from docs_text import ROOT
from rooms import floor, table

import localign


def test_the_architecture_is_drawn_from_the_imports() -> None:
    kept = (ROOT / "docs" / "pictures" / "architecture.svg").read_text(encoding="utf-8")
    assert kept == docs_pictures.architecture(), "run: python scripts/docs_pictures.py architecture"
    assert kept.count("<text ") == len(table())


def test_arrows_that_follow_from_others_are_left_out() -> None:
    assert docs_pictures.reduced({0: set(), 1: {0}, 2: {0, 1}}) == {0: set(), 1: {0}, 2: {1}}


def test_rows_import_earlier_rows() -> None:
    rows = table()[1:]
    links = docs_pictures.row_imports(rows)
    assert all(below < row for row, others in links.items() for below in others)
    alignment = next(n for n, row in enumerate(rows) if "localign.alignment" in row)
    backbones = next(n for n, row in enumerate(rows) if "localign.backbones" in row)
    assert backbones in links[alignment]
    assert floor("localign.backbones.hub") < floor("localign.alignment.masks")


def test_the_marked_patch_is_full_of_an_object() -> None:
    labels = np.zeros((48, 48), np.uint8)
    labels[16:24, 32:40] = 3
    assert docs_pictures.marked_patch(labels, (8, 8)) == (2, 4)


def test_similarity_of_a_patch_to_itself_is_one() -> None:
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    found = docs_pictures.centred_similarities(localign.load("scenes-vit"), images)
    assert found.shape == (2, 6, 6, 6, 6)
    assert found[1, 2, 4, 2, 4] == pytest.approx(1, abs=1e-5)
    assert abs(found.mean()) < 0.3


def test_contrast_compares_patches_of_one_object_with_the_rest() -> None:
    maps = np.zeros((1, 16, 16), np.uint8)
    maps[0, :8] = 5  # the upper two of four patches
    similarity = np.zeros((1, 2, 2, 2, 2), np.float32)
    similarity[0, 0, 0, 0, 1] = similarity[0, 0, 1, 0, 0] = 0.75
    similarity[0, 0, :, 1, :] = 0.25
    assert docs_pictures.contrast(similarity, maps) == pytest.approx(0.5)


def test_the_readmes_picture_is_small() -> None:
    assert Path(ROOT / "docs" / "pictures" / "similarity.svg").stat().st_size < 150_000
