"""Model cards: what they say, that their code runs, and that no card of others is replaced."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_folders import folder_of
from huggingface_hub import ModelCard
from PIL import Image

from localign.backbones import create_backbone, save_backbone
from localign.backbones.export import content_hash
from localign.backbones.publishing.cards import base_of, is_own_card, measured
from localign.cli import main
from localign.errors import UserError

SMALL = ["--weights", "none", "--image-size", "32"]
TINY = '{"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}'


def code_of(folder: Path) -> str:
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def exported(tmp_path: Path, *options: str, name: str = "vit_tiny_patch16_224") -> Path:
    arguments = ["export", name, *SMALL, "--model-kwargs", TINY, "--out", str(tmp_path / "out"), *options]
    assert main(arguments) == 0
    return tmp_path / "out"


@pytest.mark.parametrize(
    "format", ["timm", "vit", "clip", "siglip", "siglip2", "dinov2", "dinov3", "onnx", "torch-export"]
)
def test_the_code_of_a_card_gives_the_tokens(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--format", format]
    if format in ("timm", "onnx", "torch-export"):
        if format == "onnx":
            pytest.importorskip("onnxruntime")
            pytest.importorskip("onnxscript")
        folder, source = exported(tmp_path, *given), exported(tmp_path / "timm")
    else:
        folder_of("dinov2-registers" if format == "dinov2" else format, tmp_path / "foreign")
        folder = tmp_path / "out"
        assert main(["export", "foreign", *given, "--out", str(folder)]) == 0
        source = folder
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    backbone = create_backbone(str(source))
    with torch.no_grad():
        normalised = backbone.normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None])
        expected = backbone.tokens(normalised)
        names: dict[str, Any] = {"image": Image.fromarray(pixels), "pixel_values": normalised}
        if format == "onnx":
            names["pixel_values"] = normalised.numpy()
        exec(code_of(folder), names)
    assert torch.allclose(torch.as_tensor(names["tokens"]), expected, atol=2e-3)
    assert len(code_of(folder).splitlines()) == 3


def test_the_front_matter_is_the_hubs(tmp_path: Path) -> None:
    data = ModelCard.load(exported(tmp_path) / "README.md").data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "image-feature-extraction"
    assert data.tags == ["localign", "vit"]
    assert data.license == "unknown"  # random weights


def test_a_card_says_what_it_was_made_from_and_how(tmp_path: Path) -> None:
    backbone = create_backbone("vit_tiny_patch16_224", weights="none", model_kwargs=json.loads(TINY))
    run = {
        "backbone": "clip-vit-b",
        "data": "/home/me/my|images",
        "lr": 3e-4,
        "steps": None,
        "objective": "maskembed",
    }
    save_backbone(backbone, tmp_path / "a", provenance={"run": run, "steps": 7, "time": "now"})
    save_backbone(backbone, tmp_path / "b" / "a", provenance={"run": run, "steps": 7, "time": "later"})
    text = (tmp_path / "a" / "README.md").read_text()
    assert text == (tmp_path / "b" / "a" / "README.md").read_text()
    data = ModelCard.load(tmp_path / "a" / "README.md").data
    assert data.base_model == "timm/vit_base_patch16_clip_224.openai"
    assert data.license == base_of("clip-vit-b").license
    assert data.license is not None
    for row in (
        "| steps | `7` |",
        "| lr | `0.0003` |",
        "| objective | `maskembed` |",
        "| data | `my\\|images` |",
    ):
        assert row in text
    assert "/home/me" not in text


@pytest.mark.parametrize(
    ("readme", "license", "repository"),
    [
        ("---\nlicense: cc-by-nc-4.0\nbase_model: a/b\n---\n# x\n", "cc-by-nc-4.0", "a/b"),
        ("---\nlicense: [mit]\nbase_model: ../../b\n---\n", None, None),
        ("---\nlicense: mit\x1b[31m\n---\n", None, None),
        ("---\n- a\n---\n", None, None),
        ("license: mit\n", None, None),
        ("", None, None),
    ],
)
def test_a_folders_licence_is_that_of_its_own_card(
    readme: str, license: str | None, repository: str | None, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(readme)
    base = base_of(str(tmp_path))
    assert (base.license, base.repository) == (license, repository)
    assert base.name == f"the folder {tmp_path.name}"


@pytest.mark.parametrize("format", ["timm", "vit"])
def test_a_card_of_others_stays(format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = exported(tmp_path, "--format", format)
    card = folder / "README.md"
    assert is_own_card(card)
    card.write_text("stale" + card.read_text())
    assert not is_own_card(card)
    before = card.read_bytes()
    exported(tmp_path, "--format", format)
    assert card.read_bytes() == before
    assert f"kept       {card}, which localign did not write" in capsys.readouterr().out
    card.write_text("mine")
    exported(tmp_path, "--format", format)
    assert card.read_text() == "mine"
    card.unlink()
    exported(tmp_path, "--format", format)
    first = card.read_bytes()
    exported(tmp_path, "--format", format)
    assert card.read_bytes() == first


# -- measurements ------------------------------------------------------------------------------------------


def results_of(sha256: str) -> dict[str, Any]:
    def outcome(recall: float, digest: str) -> dict[str, Any]:
        metrics = {"macro_recall": recall, "macro_recall_interval": [recall - 0.01, recall + 0.01]}
        return {"backbone_sha256": digest, "results": {"test": {"linear": {"local": metrics}}}}

    entry = {"name": "new", "against": "old", "head": "linear", "task": "local", "source": "test"}
    return {
        "command": "probe",
        "probe": {"old": [outcome(0.2, "0"), outcome(0.3, "0")], "new": [outcome(0.5, sha256)]},
        "differences": [{**entry, "difference": 0.25, "interval": [0.2, 0.31]}],
        "notes": ["two seeds"],
    }


def test_measurements_are_those_of_the_exported_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kwargs: dict[str, Any] = {"weights": "none", "image_size": 32, "model_kwargs": json.loads(TINY)}
    digest = content_hash(create_backbone("vit_tiny_patch16_224", **kwargs).vit.state_dict())
    results = tmp_path / "results.json"
    results.write_text(json.dumps(results_of(digest)))
    folder = exported(tmp_path, "--results", str(tmp_path))
    row = "| test | local | linear | 25.0 | 50.0 | +25.0 [+20.0, +31.0] |"
    assert row in (folder / "README.md").read_text()
    assert "- two seeds" in (folder / "README.md").read_text()
    results.write_text(json.dumps(results_of("another")))
    arguments = ["export", "vit_tiny_patch16_224", *SMALL, "--model-kwargs", TINY]
    capsys.readouterr()
    assert main([*arguments, "--out", str(tmp_path / "new"), "--results", str(tmp_path)]) == 2
    assert "did not probe these weights, but old, new" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_backbone_probed_alone_has_no_difference() -> None:
    results = results_of("x")
    text = measured({**results, "differences": []}, "x", "here")
    assert "| test | local | linear | - | 50.0 [49.0, 51.0] | - |" in text


def test_heads_that_have_not_converged_are_marked_and_folders_are_private() -> None:
    results = results_of("x")
    results["differences"][0] |= {"converged": False, "interval": None}
    results["notes"] = ["Trained on 288 images of /home/somebody/data/coco-things and 2/3 of them."]
    text = measured(results, "x", "here")
    assert "| 25.0 | 50.0 | +25.0 (heads not converged) |" in text
    assert "- Trained on 288 images of coco-things and 2/3 of them." in text
    assert "not converged" not in measured(results_of("x"), "x", "here")


@pytest.mark.parametrize(
    "change",
    [{"command": "align"}, {"probe": 3}, {"probe": {"a": []}}, {"differences": None}, {"differences": [{}]}],
)
def test_damaged_results_are_one_line(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^here (holds|did)") as caught:
        measured({**results_of("x"), **change}, "x", "here")
    assert "\n" not in str(caught.value)
