"""An export folder is complete: it loads bitwise equal, timm can read it, and damage is detected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from localign.alignment.student import prepare_backbone
from localign.backbones import Backbone, create_backbone, load_backbone, save_backbone
from localign.backbones.export import content_hash, load_decoder_state
from localign.errors import UserError

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}
MODELS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "class token": ("vit_tiny_patch16_224", {}, 32),
    "registers": ("vit_small_patch14_reg4_dinov2", {}, (28, 56)),
    "attention pool": ("vit_so400m_patch14_siglip_384", {}, 70),
    "norm after pooling": ("vit_tiny_patch16_224", {"global_pool": "avg"}, 32),
    "pre-norm": ("vit_base_patch16_clip_quickgelu_224", {}, 32),
    "no norm": ("vit_tiny_patch16_224", {"final_norm": False}, 32),
    "rms norm": ("test_vit4", {}, 32),
    "eva": ("eva02_base_patch16_clip_224", {}, 32),
    "beit": ("beit_base_patch16_224", {}, 32),
}
CAPPED = [k for k in MODELS if k not in ("eva", "beit")]
SAME_FOR_TIMM = [k for k in MODELS if k not in ("rms norm", "no norm")]  # timm would build another norm


def build(model: str = "class token") -> Backbone:
    name, kwargs, size = MODELS[model]
    arguments = kwargs if name.startswith("test_") else {**SMALL, **kwargs}
    return create_backbone(name, weights="none", image_size=size, model_kwargs=arguments)


def aligned(model: str, soft_cap: float | None = None) -> Backbone:
    """A backbone as after alignment: without pooling and with a new final norm, here with random weights."""
    backbone = prepare_backbone(build(model).copy(soft_cap=soft_cap)).eval()
    with torch.no_grad():
        norm = getattr(backbone.vit, backbone.final_norm)
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    return backbone


def images_for(backbone: Backbone) -> torch.Tensor:
    return torch.randn(2, 3, *backbone.image_size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_a_pretrained_backbone_comes_back_bitwise(model: str, tmp_path: Path) -> None:
    backbone = build(model)
    loaded = load_backbone(save_backbone(backbone, tmp_path))
    images = images_for(backbone)
    assert torch.equal(loaded.tokens(images), backbone.tokens(images))
    assert torch.equal(loaded.tokens(images, layer=0), backbone.tokens(images, layer=0))
    assert torch.equal(loaded.pooled(images), backbone.pooled(images))
    assert (loaded.mean, loaded.std, loaded.grid, loaded.name) == (
        backbone.mean, backbone.std, backbone.grid, backbone.name,
    )  # fmt: skip


@pytest.mark.parametrize(("model", "soft_cap"), [*((m, None) for m in MODELS), *((m, 2.0) for m in CAPPED)])
@torch.no_grad()
def test_an_aligned_backbone_comes_back_bitwise(model: str, soft_cap: float | None, tmp_path: Path) -> None:
    backbone = aligned(model, soft_cap)
    loaded = load_backbone(save_backbone(backbone, tmp_path))
    images = images_for(backbone)
    assert torch.equal(loaded.tokens(images), backbone.tokens(images))
    assert (loaded.soft_cap, loaded.final_norm) == (soft_cap, backbone.final_norm)
    assert getattr(loaded.vit, loaded.final_norm).eps == 1e-5
    assert getattr(loaded.vit, "attn_pool", None) is None
    assert not loaded.training


@pytest.mark.parametrize("model", SAME_FOR_TIMM)
@torch.no_grad()
def test_timm_reads_an_uncapped_export(model: str, tmp_path: Path) -> None:
    backbone = aligned(model)
    save_backbone(backbone, tmp_path)
    from_timm: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert from_timm.pretrained_cfg["mean"] == pytest.approx(backbone.mean)
    assert getattr(from_timm, "attn_pool", None) is None
    getattr(from_timm, backbone.final_norm).eps = 1e-5  # timm has no key for this number
    images = images_for(backbone)
    features = from_timm.forward_features(images)
    if backbone.final_norm == "fc_norm":
        features = from_timm.fc_norm(features)
    assert torch.allclose(features, backbone.tokens(images), atol=1e-5)


@torch.no_grad()
def test_half_precision_storage_is_read_as_float32(tmp_path: Path) -> None:
    backbone = build()
    save_backbone(backbone, tmp_path, dtype=torch.float16)
    loaded = load_backbone(tmp_path)
    for name, tensor in loaded.vit.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, backbone.vit.state_dict()[name].half().float())
    assert (tmp_path / "model.safetensors").stat().st_size < sum(
        p.numel() for p in backbone.parameters()
    ) * 2.2


def test_provenance_and_timm_keys_are_in_the_config(tmp_path: Path) -> None:
    save_backbone(aligned("class token", 30.0), tmp_path, provenance={"run": "r1", "seed": 0})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    ours = config["localign"]
    assert ours["provenance"] == {"run": "r1", "seed": 0}
    assert (ours["soft_cap"], ours["norm_eps"], ours["final_norm"], ours["feature_layer"]) == (
        30.0,
        1e-5,
        "norm",
        1,
    )


def test_the_content_hash_sees_names_types_shapes_and_values() -> None:
    base = {"a": torch.arange(6.0), "b": torch.ones(1)}
    variants: list[dict[str, torch.Tensor]] = [
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"].view(2, 3), "b": base["b"]},
        {"a": base["a"].double(), "b": base["b"]},
        {"a": base["a"] + 1, "b": base["b"]},
        {"a": base["a"]},
    ]
    assert content_hash(base) == content_hash(dict(reversed(list(base.items()))))
    assert len({content_hash(base), *map(content_hash, variants)}) == 6


def break_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        section = config["localign"] if key in config["localign"] else config
        section[key] = value
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (break_weights, "damaged"),
        (cut_weights, "not a readable checkpoint"),
        (lambda f: (f / "model.safetensors").unlink(), "not a complete export"),
        (lambda f: (f / "config.json").unlink(), "not an exported backbone"),
        (lambda f: (f / "config.json").write_text("{"), "not readable JSON"),
        (lambda f: (f / "config.json").write_text("{}"), "not written by localign"),
        (lambda f: change_config(f, format=99), "format 99"),
        (lambda f: change_config(f, architecture="no_such_model"), "describes a model that cannot be built"),
        (lambda f: change_config(f, model_args={"depth": 3}), "does not fit"),
    ],
)
def test_a_damaged_export_is_refused(damage: Any, reason: str, tmp_path: Path) -> None:
    save_backbone(build(), tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=reason):
        load_backbone(tmp_path)


def test_the_decoder_file_belongs_to_the_last_export(tmp_path: Path) -> None:
    decoder = {"decoder.head.weight": torch.ones(2, 3)}
    save_backbone(build(), tmp_path, decoder=decoder, decoder_config={"width": 48})
    assert torch.equal(load_decoder_state(tmp_path)["decoder.head.weight"], torch.ones(2, 3))
    content = bytearray((tmp_path / "decoder.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "decoder.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_decoder_state(tmp_path)
    save_backbone(build(), tmp_path)
    with pytest.raises(UserError, match="without a decoder"):
        load_decoder_state(tmp_path)
