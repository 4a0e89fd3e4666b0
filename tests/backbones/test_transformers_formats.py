"""Backbones from folders in transformers' format, and back: the same tokens as transformers' own classes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_folders import FORMATS, MODELS, PATCH, SIZE, folder_of, hidden_states, model_of
from safetensors.torch import load_file, save_file

from localign.backbones import create_backbone, load_backbone, save_backbone
from localign.backbones.families.writing import save_transformers
from localign.cli import main
from localign.errors import UserError
from localign.vlm.model.vision import TowerConfig


def pixels(size: int = SIZE) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_block_equals_transformers(name: str, tmp_path: Path) -> None:
    model, folder = folder_of(name, tmp_path)
    backbone = create_backbone(str(folder))
    expected = hidden_states(model, pixels())
    assert backbone.depth == len(expected.hidden_states) - 1
    for layer, states in enumerate(expected.hidden_states[1:]):
        torch.testing.assert_close(backbone.tokens(pixels(), layer, norm=False), states, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2", "dinov2", "dinov2-registers", "dinov3"])
@torch.no_grad()
def test_the_pooled_output_equals_transformers(name: str, tmp_path: Path) -> None:
    model, folder = folder_of(name, tmp_path)
    pooled = create_backbone(str(folder)).pooled(pixels())
    torch.testing.assert_close(pooled, hidden_states(model, pixels()).pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_transformers_loads_what_is_written(name: str, tmp_path: Path) -> None:
    model, folder = folder_of(name, tmp_path / "in")
    backbone = create_backbone(str(folder))
    (tmp_path / "out").mkdir()
    save_transformers(backbone, tmp_path / "out", FORMATS[name])
    again, report = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["unexpected_keys"]
    assert all(key.startswith("pooler.") for key in report["missing_keys"])
    theirs, ours = (hidden_states(m.eval(), pixels()).hidden_states for m in (model, again))
    for before, after in zip(theirs, ours, strict=True):
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "dinov3", "vit"])
def test_exports_of_localign_keep_every_setting(name: str, tmp_path: Path) -> None:
    _, folder = folder_of(name, tmp_path / "in")
    backbone = create_backbone(str(folder))
    again = load_backbone(save_backbone(backbone, tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(again(pixels()), backbone(pixels()))


@pytest.mark.parametrize("name", ["clip-with-text", "llava-clip", "dinov2"])
@pytest.mark.parametrize("layout", ["shards", "torch"])
def test_other_layouts_of_weights(name: str, layout: str, tmp_path: Path) -> None:
    model, _ = folder_of(name, tmp_path / "whole")
    other = tmp_path / "other"
    if layout == "shards":
        model.save_pretrained(other, max_shard_size="20KB")
        assert len(list(other.glob("*.safetensors"))) > 2
    else:
        shutil.copytree(tmp_path / "whole", other)
        torch.save(load_file(other / "model.safetensors"), other / "pytorch_model.bin")
        (other / "model.safetensors").unlink()
    first, second = (create_backbone(str(tmp_path / n)).vit.state_dict() for n in ("whole", "other"))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "dinov3", "vit"])
@pytest.mark.parametrize("size", [SIZE + 2 * PATCH, (SIZE, SIZE + PATCH)])
def test_another_image_size(name: str, size: Any, tmp_path: Path) -> None:
    _, folder = folder_of(name, tmp_path)
    backbone = create_backbone(str(folder), image_size=size)
    rows, columns = (size, size) if isinstance(size, int) else size
    assert backbone.grid == (rows // PATCH, columns // PATCH)
    with torch.no_grad():
        tokens = backbone(torch.zeros(1, 3, rows, columns))
    assert tokens.shape[1] == backbone.num_prefix_tokens + backbone.num_patches


def test_pixel_statistics_come_from_the_folder(tmp_path: Path) -> None:
    _, folder = folder_of("clip", tmp_path)
    assert create_backbone(str(folder)).mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    backbone = create_backbone(str(folder))
    assert (backbone.mean, backbone.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    for wrong in ([0.1, 0.2], [0, 1, 1], "x", [1, 2, None]):
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_std": wrong}))
        with pytest.raises(UserError, match="image_std"):
            create_backbone(str(folder))


def rewrite(folder: Path, changes: dict[str, Any], *removed: str) -> None:
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in removed}))


def without(folder: Path, tensor: str) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != tensor}, folder / "model.safetensors")


def with_extra(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), "encoder.layers.0.gate": torch.zeros(1)}, path)


FAULTS = {
    "another architecture": (
        lambda f: rewrite(f, {"model_type": "bert"}),
        "'bert'.*clip_vision_model.*dinov3_vit",
    ),
    "a bare LLaVA": (
        lambda f: rewrite(f, {"model_type": "llava_llama", "mm_vision_tower": "a/b"}),
        "vision model is a/b: give that",
    ),
    "another vision model": (
        lambda f: rewrite(f, {"model_type": "qwen2_vl", "vision_config": {"model_type": "qwen2_vl"}}),
        "qwen2_vl",
    ),
    "a missing tensor": (lambda f: without(f, "post_layernorm.bias"), "missing 1 .norm.bias"),
    "a missing projection": (
        lambda f: without(f, "encoder.layers.1.self_attn.k_proj.bias"),
        "missing 1 .blocks.1.attn.qkv.bias",
    ),
    "an extra tensor": (with_extra, "extra 1 .encoder.layers.0.gate"),
    "weights of another model": (
        lambda f: without(f, "embeddings.class_embedding"),
        "no tensor embeddings.class_",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "has no model.safetensors or pytorch_model.bin",
    ),
    "truncated weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:100]),
        "model.safetensors is not a readable safetensors file",
    ),
    "wrong sizes": (lambda f: rewrite(f, {"hidden_size": 64}), "wrong shape"),
    "more blocks": (lambda f: rewrite(f, {"num_hidden_layers": 3}), "missing"),
    "no number": (lambda f: rewrite(f, {"hidden_size": "large"}), "hidden_size in config.json is 'large'"),
    "a huge number": (lambda f: rewrite(f, {"num_hidden_layers": 10**9}), "num_hidden_layers in config.json"),
    "an unknown activation": (
        lambda f: rewrite(f, {"hidden_act": "mish"}),
        "hidden_act in config.json is 'mish'",
    ),
    "a config that is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        "list instead of a JSON object",
    ),
    "a broken config": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "it has no config.json"),
    "an index that leaves the folder": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "../b.safetensors"}}'
        ),
        "weight_map",
    ),
    "a missing shard": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
        "lacks 1 weight files, such as b.safetensors",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_named(fault: str, tmp_path: Path) -> None:
    _, folder = folder_of("clip", tmp_path)
    damage, line = FAULTS[fault]
    damage(folder)  # type: ignore[no-untyped-call]
    with pytest.raises(UserError, match=line) as raised:
        create_backbone(str(folder))
    assert "\n" not in str(raised.value)


def test_a_format_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    backbone = create_backbone(str(folder_of("clip", tmp_path)[1]))
    for family in ("siglip", "dinov2", "dinov3", "vit"):
        with pytest.raises(UserError, match=f"does not fit the format {family}"):
            save_transformers(backbone, tmp_path, family)


def export(*arguments: object) -> int:
    return main(["export", *map(str, arguments)])


def test_the_command_measures_its_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = folder_of("clip", tmp_path / "in")
    assert export(folder, "--format", "clip", "--out", tmp_path / "out") == 0
    assert "tokens within" in capsys.readouterr().out
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.slow
def test_another_process_without_localign_loads_it(tmp_path: Path) -> None:
    model, folder = folder_of("siglip", tmp_path / "in")
    assert export(folder, "--format", "siglip", "--out", tmp_path / "out") == 0
    torch.save(pixels(), tmp_path / "pixels.pt")
    program = (
        "import sys, torch, transformers\n"
        "model = transformers.SiglipVisionModel.from_pretrained(sys.argv[1]).eval()\n"
        "with torch.no_grad(): tokens = model(torch.load(sys.argv[2])).last_hidden_state\n"
        "assert 'localign' not in sys.modules\n"
        "torch.save(tokens, sys.argv[3])\n"
    )
    paths = [str(tmp_path / name) for name in ("out", "pixels.pt", "tokens.pt")]
    subprocess.run([sys.executable, "-c", program, *paths], check=True, cwd=tmp_path)
    expected = hidden_states(model, pixels()).last_hidden_state
    torch.testing.assert_close(torch.load(tmp_path / "tokens.pt"), expected, atol=1e-5, rtol=1e-5)


def capped(tmp_path: Path, cap: float) -> Path:
    backbone = create_backbone(str(folder_of("clip", tmp_path / "in")[1]))
    return save_backbone(backbone.copy(soft_cap=cap), tmp_path / "capped")


def test_a_soft_cap_is_never_dropped_silently(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = capped(tmp_path, 30.0)
    assert export(folder, "--format", "clip", "--out", tmp_path / "out") == 2
    assert "--bake" in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(("cap", "code"), [(1e4, 0), (0.2, 2)])
def test_baking_measures_the_change(
    cap: float, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    Image.effect_noise((40, 40), 90).save(tmp_path / "images" / "a.png")
    folder = capped(tmp_path, cap)
    arguments = ("--format", "clip", "--bake", "--images", tmp_path / "images", "--tolerance", 1e-4)
    assert export(folder, *arguments, "--out", tmp_path / "out") == code
    assert (tmp_path / "out" / "config.json").exists() == (code == 0)
    printed = capsys.readouterr()
    assert ("tokens within" in printed.out) == (code == 0)
    assert ("more than the tolerance" in printed.err) == (code == 2)


def test_the_seed_draws_random_weights(tmp_path: Path) -> None:
    _, folder = folder_of("clip", tmp_path)
    (folder / "model.safetensors").unlink()
    first, second, other = (create_backbone(str(folder), weights="none", seed=s).vit for s in (1, 1, 2))
    assert torch.equal(first.pos_embed, second.pos_embed)
    assert not torch.equal(first.pos_embed, other.pos_embed)


def test_a_repository_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of("dinov2", tmp_path / "cache")
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(repository: str, *, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert create_backbone("facebook/dinov2-tiny").grid == (4, 4)
    assert [repository for repository, _ in asked] == ["facebook/dinov2-tiny"]
    assert not any(pattern.endswith(".py") or pattern == "*" for pattern in asked[0][1])


def test_an_unreachable_hub_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def snapshot_download(repository: str, *, allow_patterns: list[str]) -> str:
        raise OSError("no route\nmore\nlines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(
        UserError, match="openai/clip cannot be downloaded from the model hub: no route; give"
    ):
        create_backbone("openai/clip")
    assert not capsys.readouterr().err


def test_weights_file_and_folder_exclude_each_other(tmp_path: Path) -> None:
    _, folder = folder_of("vit", tmp_path)
    with pytest.raises(UserError, match="weights of its own"):
        create_backbone(str(folder), weights="x.pth")


def test_models_have_weights_that_matter() -> None:
    assert not torch.equal(model_of("vit", 0).embeddings.cls_token, model_of("vit", 1).embeddings.cls_token)


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "dinov3", "vit"])
@torch.no_grad()
def test_a_tower_of_a_vision_language_model_is_rebuilt_exactly(name: str, tmp_path: Path) -> None:
    backbone = create_backbone(str(folder_of(name, tmp_path)[1]))
    stored = json.loads(json.dumps(asdict(TowerConfig.of(backbone, layer=-1, norm=True, keep_prefix=False))))
    tower = TowerConfig(**stored).build().eval()
    tower.vit.load_state_dict(backbone.vit.state_dict(), strict=False)
    assert torch.equal(tower(pixels()), backbone(pixels()))
