"""DINOv2 with its real weights: in from two formats, aligned, out to two formats, looked at, and probed."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dense_features import (
    class_agreement,
    components_picture,
    main_classes,
    nearest_picture,
    patch_tokens,
    photographs,
)
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from localign.backbones import create_backbone
from localign.cli import main

TOLERANCE = 1e-4
"""Tokens of real weights after the final norm reach 20; float32 rounding of 12 blocks stays below this."""


def run(command: str) -> None:
    """Run a localign command, which must succeed."""
    assert main(shlex.split(command)) == 0


@pytest.fixture(scope="module")
def random(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with random weights."""
    folder = tmp_path_factory.mktemp("random") / "dinov2-random"
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config.from_pretrained(models / "dinov2-small")).save_pretrained(folder)
    return folder


def test_the_input_has_the_size_that_the_image_processor_gives(models: Path) -> None:
    assert create_backbone(models / "dinov2-small").image_size == (224, 224)


@pytest.mark.parametrize("side", [518, 224, 112])
def test_both_folders_give_the_tokens_of_transformers(models: Path, data: Path, side: int) -> None:
    ours = create_backbone(models / "dinov2-small", image_size=side)
    images, _ = photographs(data, side, 2)
    pixels = ours.normalise(images)
    theirs = Dinov2Model.from_pretrained(models / "dinov2-small").eval()
    with torch.no_grad():
        wanted = theirs(pixels, output_hidden_states=True)
        assert wanted.last_hidden_state.shape == (2, 1 + (side // 14) ** 2, 384)
        assert (ours.tokens(pixels) - wanted.last_hidden_state).abs().max() < TOLERANCE
        for layer in (0, 5, 11):
            tokens = ours.tokens(pixels, layer=layer, norm=False)
            hidden = wanted.hidden_states[layer + 1]
            assert (tokens - hidden).abs().max() < TOLERANCE * hidden.abs().max()
        if side == 518:  # timm resamples positions in another way
            in_timm = create_backbone(models / "dinov2-timm")
            assert (in_timm.tokens(in_timm.normalise(images)) - ours.tokens(pixels)).abs().max() < TOLERANCE


LOAD = """
import sys, torch
folder, kind, pixels, out = sys.argv[1:]
pixels = torch.load(pixels)
if kind == "dinov2":
    from transformers import AutoModel
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "Dinov2Model", type(model)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    tokens = model.eval()(pixels).last_hidden_state
else:
    import timm
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    tokens = model.forward_features(pixels)
assert not any(name.split(".")[0] == "localign" for name in sys.modules)
torch.save(tokens.detach(), out)
"""
"""Loads an export in a process that knows nothing of this package."""


def test_a_run_on_photographs_is_exported_to_both_formats(models: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(
        f"align --backbone {models / 'dinov2-small'} --image-size 112 --soft-cap none --steps 20 --batch-size 8 "
        f"--data {data / 'imagenet-sample' / 'train'} --device cpu --log-every 5 --out {out}"
    )
    losses = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if "loss" in line]
    assert losses[-1] < losses[0], losses
    aligned = create_backbone(out)
    images, _ = photographs(data, 112, 4)
    pixels = aligned.normalise(images)
    with torch.no_grad():
        tokens = aligned.tokens(pixels)
        before = create_backbone(models / "dinov2-small", image_size=112).tokens(pixels)
    assert (tokens - before).abs().max() > 0.01, "20 steps change the weights"
    torch.save(pixels, tmp_path / "pixels.pt")
    for kind in ("dinov2", "timm"):
        folder, result = tmp_path / kind, tmp_path / f"{kind}.pt"
        run(f"export {out} --format {kind} --out {folder}")
        arguments = [folder, kind, tmp_path / "pixels.pt", result]
        done = subprocess.run(
            [sys.executable, "-c", LOAD, *map(str, arguments)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        theirs: Tensor = torch.load(result)
        assert theirs.shape == (4, 65, 384)
        assert (theirs - tokens).abs().max() < TOLERANCE, kind


def test_near_tokens_are_of_the_same_things(models: Path, random: Path, data: Path, pictures: Path) -> None:
    """Writes ``components-*.png`` and ``nearest-*.png``, to be looked at."""
    agreement = {}
    for name, folder in (("real", models / "dinov2-small"), ("random", random)):
        backbone = create_backbone(folder, image_size=224)
        images, maps = photographs(data, 224, 64)
        tokens, classes = patch_tokens(backbone, images), main_classes(backbone, maps, 81)
        agreement[name] = class_agreement(tokens, classes)
        components_picture(images[:8], tokens[:8], backbone.grid).save(pictures / f"components-{name}.png")
        things = [int(i) for i in (classes.flatten() > 0).nonzero()[:, 0]]
        queries = things[:: len(things) // 8][:8]
        nearest_picture(images, tokens, backbone.grid, queries).save(pictures / f"nearest-{name}.png")
    print(f"nearest patches with the same thing: {agreement}")
    assert agreement["real"] > 2 * agreement["random"]


def test_heads_that_have_converged_tell_real_weights_from_random_ones(
    models: Path, random: Path, data: Path, tmp_path: Path
) -> None:
    run(
        f"probe random={random},real={models / 'dinov2-small'} --data {data / 'coco-things'} --image-size 112 "
        f"--heads [linear,mlp] --device cpu --out {tmp_path}"
    )
    results = json.loads((tmp_path / "results.json").read_text())
    for outcomes in results["probe"].values():
        for head, tasks in outcomes[0]["train"]["convergence"].items():
            assert {task: verdict["converged"] for task, verdict in tasks.items()} == {
                "local": True,
                "global": True,
            }, head
    assert len(results["differences"]) == 4
    for entry in results["differences"]:
        recalls = {
            name: results["probe"][name][0]["results"]["test"][entry["head"]][entry["task"]]
            for name in ("real", "random")
        }
        low, high = recalls["random"]["macro_recall_interval"]
        assert entry["converged"] is True
        assert entry["interval"][0] > 0, entry
        assert recalls["real"]["macro_recall_interval"][0] > high > low, (entry, recalls)
