"""Probing at native resolution: images keep their aspect ratio, and padding counts nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from probing_toys import ALONE

from localign.backbones import Backbone, create_backbone, save_backbone
from localign.backbones.native import patchify
from localign.cli import main
from localign.data.transforms import NativeView
from localign.errors import UserError
from localign.options.names import Cache
from localign.options.probe import ProbeCommandConfig, ProbeConfig
from localign.probing import probe_heads
from localign.probing.cache import cache_key
from localign.probing.datasets import open_labelled
from localign.probing.features import Extraction
from localign.probing.labels import reduce_labels

SHAPES = [(24, 24), (48, 16), (16, 40), (30, 21), (64, 8), (24, 16)]
"""Widths and heights."""
MOST = 10
SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two halves, red or blue, whose label maps say which."""
    folder = tmp_path_factory.mktemp("labelled")
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for number, (width, height) in enumerate(SHAPES * 4):
            labels = np.full((height, width), 1 + draw.integers(2), np.uint8)
            labels[:, width // 2 :] = 1 + draw.integers(2)
            colours = np.array([[0, 0, 0], [220, 20, 20], [20, 20, 220]], np.uint8)
            Image.fromarray(colours[labels]).save(folder / "images" / split / f"{number:02d}.png")
            Image.fromarray(labels).save(folder / "masks" / split / f"{number:02d}.png")
    (folder / "classes.json").write_text(json.dumps({"0": "unlabeled", "1": "red", "2": "blue"}))
    return folder


def backbone_of(name: str = "vit_tiny_patch16_224") -> Backbone:
    return create_backbone(name, weights="none", image_size=24, model_kwargs=SMALL, seed=1)


def extraction(data: Path, backbone: Backbone) -> Extraction:
    source = open_labelled(str(data), "train", scenes=0)
    view = NativeView(backbone.patch_size, MOST, "bilinear")
    return Extraction(backbone, "0" * 64, source, torch.float32, False, 4, 0, ALONE, view)


@torch.no_grad()
def test_tokens_and_targets_are_those_of_each_image_alone(data: Path) -> None:
    backbone = backbone_of()
    what = extraction(data, backbone)
    assert what.token_shape == (1 + MOST, 32)
    assert what.ignores
    assert cache_key(what)["max_patches"] == MOST
    rows = np.arange(6)
    ((tokens, labels),) = what.run(rows, 6)
    assert tokens.shape == (6, 1 + MOST, 32)
    counted = labels.counted
    assert counted is not None
    view = what.native
    assert view is not None
    for row in rows:
        image, maps = what.source.load_labelled(int(row))
        pixels, codes = view(image), view.labels(maps)
        assert pixels.shape[1:] == codes.shape
        count = len(patchify(pixels, (8, 8)))
        alone = create_backbone(
            "vit_tiny_patch16_224", weights="none", image_size=24, model_kwargs=SMALL, seed=1
        )
        alone.vit.set_input_size(img_size=tuple(pixels.shape[1:]))
        expected = alone(alone.normalise(pixels[None]))[0]
        torch.testing.assert_close(tokens[row, : 1 + count], expected, atol=1e-5, rtol=1e-5)
        assert not tokens[row, 1 + count :].any()
        target = reduce_labels(codes[None], 8, 3)
        assert torch.equal(labels.patch[row, :count], target.patch[0])
        assert torch.equal(labels.majority[row, :count], target.majority[0])
        assert torch.equal(labels.image[row], target.image[0])
        assert counted[row].tolist() == [True] * count + [False] * (MOST - count)


def test_heads_learn_and_storage_changes_nothing(data: Path, tmp_path: Path) -> None:
    sources = [open_labelled(str(data), split, scenes=0) for split in ("train", "test")]
    found = {}
    for cache in get_args(Cache)[1:]:
        config = ProbeConfig(heads=("linear",), tasks=("local", "majority", "global"), steps=150, batch=12, lr=1e-2,
                             final_lr=1e-3, cache=cache, cache_dtype="float32")  # fmt: skip
        (probed,) = probe_heads(
            backbone_of(), sources[0], {"test": sources[1]}, config, cache_folder=tmp_path, max_patches=MOST
        )
        found[cache] = probed.outcome["results"]["test"]["linear"]
    assert set(found) == {"none", "disk", "device"}
    for metrics in found.values():
        recall = metrics["majority"]["macro_recall"]
        assert recall is not None
        assert recall > 0.8
        for task in ("local", "majority", "global"):
            expected = found["none"][task]["macro_recall"]
            assert metrics[task]["macro_recall"] == pytest.approx(expected, abs=0.02)


@pytest.mark.slow
def test_the_command_probes_images_of_several_sizes(data: Path, tmp_path: Path) -> None:
    tower = save_backbone(backbone_of(), tmp_path / "tower")
    command = ["probe", "--backbone", str(tower), "--data", str(data), "--max-patches", str(MOST), "--heads", "linear",
               "--steps", "5", "--batch-size", "4", "--device", "cpu", "--out", str(tmp_path / "run")]  # fmt: skip
    assert main(command) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["config"]["max_patches"] == MOST
    assert main([*command, "--heads", "transformer"]) == 2


def test_what_does_not_fit_is_one_line(data: Path) -> None:
    source = open_labelled(str(data), "train", scenes=0)

    def run(name: str, **options: Any) -> None:
        probe_heads(backbone_of(name), source, source, ProbeConfig(steps=2, **options), max_patches=MOST)

    with pytest.raises(UserError, match="transformer heads have positions of one grid"):
        run("vit_tiny_patch16_224")
    with pytest.raises(UserError, match="no class token"):
        run("vit_base_patch16_siglip_224", heads=("linear",))
    with pytest.raises(UserError, match="need a ViT with a position embedding"):
        run("beit_base_patch16_224", heads=("linear",))
    with pytest.raises(UserError, match="--max-patches must be at least 4"):
        ProbeCommandConfig(max_patches=2)
