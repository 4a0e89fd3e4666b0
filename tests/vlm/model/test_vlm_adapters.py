"""Adapters: sizes, initial weights, weights copied from trained models, and errors."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_vlm import tiny_backbone
from torch import Tensor, nn
from vlm_models import KINDS, aligned_source, pixels, sides, student_of, tiny_student

from localign.alignment.published import read_published
from localign.alignment.student import Student, build_student
from localign.backbones import Backbone, create_backbone
from localign.backbones.building import build_vit
from localign.errors import UserError
from localign.options.names import AdapterName
from localign.vlm.model.adapters import Adapter, AdapterConfig, build_adapter, fresh_adapter
from localign.vlm.model.presets import VisionSource, build_tower, build_vision
from localign.vlm.model.pretrained_adapters import (
    adapter_from_backbone,
    adapter_from_student,
    fused_adapter_from_student,
)

GOLDEN = Path(__file__).resolve().parents[4] / "shared" / "golden"
VARIANTS = ("cls", "cls_prenorm_ls", "no_cls_irregular", "registers")
needs_golden = pytest.mark.skipif(
    not (GOLDEN / "adapters").is_dir(), reason=f"the reference numbers are not at {GOLDEN}"
)
WIDTH = 32


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Language model of width 4,096; CLIP ViT-L at 336 pixels and SigLIP SO400M at 384.
PUBLISHED_SIZES: dict[tuple[str, bool], tuple[int, int]] = {
    ("linear", False): (4_198_400, 4_722_688),
    ("mlp", False): (20_979_712, 21_504_000),
    ("mlp", True): (20_979_712, 21_504_000),
    ("fused-mlp", False): (67_125_248, 71_385_600),
    ("transformer", False): (31_037_440, 38_778_112),
    ("decoder", True): (31_037_440, 38_778_112),
    ("truncated", False): (29_392_896, 35_204_000),
    ("truncated", True): (29_392_896, 35_204_000),
}


@cache
def published_sources(index: int) -> dict[str, VisionSource]:
    """The paper's backbones on the meta device; shallow, because no adapter's size depends on their depth."""
    name = ("clip-vit-l-336px", "siglip-vit-so400m-384px")[index]
    with torch.device("meta"):
        shallow: dict[str, Any] = {"weights": "none", "model_kwargs": {"depth": 4}}
        backbone = create_backbone(name, **shallow)
        dino = create_backbone(
            "vit_large_patch14_reg4_dinov2.lvd142m", image_size=backbone.image_size, **shallow
        )
        student = build_student(backbone, soft_cap=30.0)
    aligned = VisionSource(student.encoder.backbone, aligned=True, student=student)
    return {"baseline": VisionSource(backbone), "aligned": aligned, "dino": VisionSource(dino)}


@pytest.mark.parametrize("index", [0, 1], ids=["clip", "siglip"])
@pytest.mark.parametrize(("kind", "aligned"), PUBLISHED_SIZES)
def test_parameters_and_tokens_are_those_of_the_paper(kind: Any, aligned: bool, index: int) -> None:
    known = published_sources(index)
    sources = [known["aligned" if aligned else "baseline"]]
    if kind == "fused-mlp":
        sources.insert(0, known["dino"])
    with torch.device("meta"):
        tower, adapter = build_vision(kind, sources, 4096)
    assert size(adapter) == PUBLISHED_SIZES[kind, aligned][index]
    prefix = 1 if index == 0 and (aligned or kind in ("transformer", "truncated")) else 0
    assert tower.num_tokens == (576, 729)[index] + prefix
    assert all(parameter.is_meta for parameter in (*tower.parameters(), *adapter.parameters()))


@pytest.mark.parametrize("index", [0, 1], ids=["clip", "siglip"])
def test_the_published_truncated_baseline_lacks_the_norm_and_the_last_block(index: int) -> None:
    source = published_sources(index)["baseline"]
    with torch.device("meta"):
        tower, adapter = build_vision("truncated", [source], 4096, published_quirks=True)
    assert size(adapter) == (29_390_848, 35_201_696)[index]
    assert tower.configs[0].layer == source.backbone.depth - 4


def test_a_student_on_the_meta_device_gives_an_adapter_on_the_meta_device() -> None:
    student = student_of(published_sources(0)["aligned"])
    assert all(parameter.is_meta for parameter in adapter_from_student(student, 64).parameters())


@cache
def golden_student(variant: str) -> Student:
    facts = json.loads((GOLDEN / "maskembed" / "meta.json").read_text())[variant]
    kwargs = facts["vit"]
    vit = build_vit("vit_base_patch16_224", kwargs, pretrained=False)
    backbone = Backbone(vit, name=variant, architecture="vit_base_patch16_224", model_kwargs=kwargs)
    return read_published(GOLDEN / "maskembed" / f"{variant}.pth.tar", backbone, soft_cap=30.0)


@needs_golden
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_decoder_adapter_equals_the_published_one(variant: str) -> None:
    golden = load_file(GOLDEN / "adapters" / "adapters.safetensors")
    facts = json.loads((GOLDEN / "adapters" / "adapters.json").read_text())
    adapter: Any = adapter_from_student(golden_student(variant), facts["llm_width"]).eval()
    tokens = golden[f"{variant}.tokens"]
    assert torch.equal(adapter(tokens), golden[f"{variant}.initial"])
    assert not adapter(tokens).any()
    adapter.decoder.head.weight.copy_(golden[f"{variant}.head.weight"])
    adapter.decoder.head.bias.copy_(golden[f"{variant}.head.bias"])
    assert torch.allclose(adapter(tokens), golden[f"{variant}.decoder_adapter"], rtol=0, atol=1e-5)


@needs_golden
@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_adapters_have_the_published_sizes(variant: str) -> None:
    facts = json.loads((GOLDEN / "adapters" / "adapters.json").read_text())
    student, width = golden_student(variant), facts["llm_width"]
    input_width = student.encoder.backbone.width
    kinds: list[tuple[str, AdapterName, int]] = [
        ("linear", "linear", 1),
        ("mlp", "mlp", 1),
        ("fused_mlp", "fused-mlp", 2),
    ]
    sizes = {
        name: size(build_adapter(AdapterConfig(kind, factor * input_width, width, num_tokens=4)))
        for name, kind, factor in kinds
    }
    sizes["decoder"] = size(adapter_from_student(student, width))
    assert sizes == facts[variant]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_embeddings_start_at_zero_only_for_adapters_with_a_zero_output_layer(kind: Any) -> None:
    tower, adapter = build_vision(kind, sides(kind), WIDTH)
    embeddings = adapter(tower(pixels()))
    assert embeddings.shape == (2, tower.num_tokens, WIDTH)
    assert embeddings.any() == (kind in ("mlp", "fused-mlp", "transformer", "fused-decoder"))


def test_a_transformer_from_scratch_starts_as_the_paper_says() -> None:
    adapter: Any = fresh_adapter(
        "transformer", build_tower("transformer", [VisionSource(tiny_backbone())]), WIDTH
    )
    assert len(adapter.decoder.blocks) == 2
    for block in adapter.decoder.blocks:
        assert torch.equal(block.ls1.gamma, torch.full((16,), 1e-6))
        assert torch.equal(block.ls2.gamma, torch.full((16,), 1e-6))
        assert block.norm1.eps == 1e-5
        assert block.attn.qkv.bias is not None
        assert type(block.mlp.act) is nn.GELU
    assert adapter.decoder.norm.eps == 1e-5
    assert 0.01 < adapter.decoder.pos_embed.std() < 0.03
    assert adapter.decoder.head.weight.any()


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_built_again_from_its_config_and_weights(kind: Any) -> None:
    tower, adapter = build_vision(kind, sides(kind), WIDTH, seed=4)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter))
    config = AdapterConfig(**json.loads(json.dumps(asdict(adapter.config))))
    assert config == adapter.config
    twin = build_adapter(config)
    twin.load_state_dict(adapter.state_dict(), strict=True)
    tokens = tower(pixels())
    assert torch.equal(twin.eval()(tokens), adapter.eval()(tokens))


def flat_weights(adapter: Adapter) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in adapter.parameters()])


@pytest.mark.parametrize("kind", ["mlp", "transformer", "fused-decoder"])
def test_the_start_depends_on_the_seed_alone(kind: Any) -> None:
    sources = sides(kind)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    _, first = build_vision(kind, sources, WIDTH, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    _, again = build_vision(kind, sources, WIDTH, seed=3)
    _, other = build_vision(kind, sources, WIDTH, seed=4)
    assert torch.equal(flat_weights(first), flat_weights(again))
    assert not torch.equal(flat_weights(first), flat_weights(other))


@torch.no_grad()
def test_the_decoder_adapter_is_the_students_decoder_on_embeddings_with_hidden_prefix() -> None:
    student = tiny_student()
    adapter: Any = adapter_from_student(student, 16).eval()
    assert student.decoder is not None
    adapter.decoder.head.load_state_dict(student.decoder.head.state_dict())
    tower = build_tower("decoder", [VisionSource(student.encoder.backbone, aligned=True, student=student)])
    tokens = tower(pixels())
    images = student.encoder.backbone.normalise(pixels())
    expected = student(images, torch.ones(2, 1, 4, dtype=torch.bool))
    assert torch.allclose(adapter(tokens), expected, atol=1e-5)
    tokens[:, 0] = 100  # the class token's content is hidden from the decoder
    assert torch.allclose(adapter(tokens), expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("aligned", [False, True])
def test_a_truncated_adapter_continues_the_vit_to_its_end(aligned: bool) -> None:
    source = aligned_source() if aligned else VisionSource(tiny_backbone())
    whole = source.backbone
    tower, built = build_vision("truncated", [source], whole.width)
    adapter: Any = built
    nn.init.eye_(adapter.head.weight)
    assert torch.allclose(adapter(tower(pixels())), whole(whole.normalise(pixels())), atol=1e-5)
    whole.requires_grad_(True)
    assert all(parameter.requires_grad for parameter in adapter.parameters())


@torch.no_grad()
def test_the_published_truncated_baseline_ends_one_block_early_without_norm() -> None:
    kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
    vit = build_vit("vit_tiny_patch16_224", kwargs, pretrained=False)
    whole = Backbone(vit, name="four", architecture="vit_tiny_patch16_224", model_kwargs=kwargs).eval()
    tower, built = build_vision("truncated", [VisionSource(whole)], 16, published_quirks=True)
    adapter: Any = built
    nn.init.eye_(adapter.head.weight)
    expected = whole.tokens(whole.normalise(pixels()), layer=-2, norm=False)
    assert torch.allclose(adapter(tower(pixels())), expected, atol=1e-5)
    aligned = VisionSource(whole, aligned=True)  # the published code treats aligned backbones correctly
    _, adapter = build_vision("truncated", [aligned], 16, published_quirks=True)
    assert isinstance(adapter.norm, nn.LayerNorm)


@torch.no_grad()
def test_a_fused_decoder_concatenates_the_decoders_patches_with_the_other_tokens() -> None:
    other = VisionSource(tiny_backbone("other", width=24))
    aligned = aligned_source()
    alone: Any = adapter_from_student(student_of(aligned), 16)
    alone.decoder.head = nn.Identity()
    tokens = build_tower("decoder", [aligned])(pixels())
    decoded = alone(tokens)[:, 1:]
    plain = build_tower("mlp", [other])(pixels())
    for sources, expected in (([other, aligned], [plain, decoded]), ([aligned, other], [decoded, plain])):
        tower, adapter = build_vision("fused-decoder", sources, WIDTH)
        assert adapter(tower(pixels())).shape == (2, 4, WIDTH)
        adapter.mlp = nn.Identity()
        assert torch.allclose(adapter(tower(pixels())), torch.cat(expected, dim=-1), atol=1e-5)


@torch.no_grad()
def test_a_decoder_keeps_the_activation_it_was_trained_with_unless_asked() -> None:
    kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    name = "vit_base_patch16_clip_quickgelu_224"
    vit = build_vit(name, kwargs, pretrained=False)
    clip = Backbone(vit, name="clip", architecture=name, model_kwargs=kwargs)
    source = aligned_source(clip)
    outputs = []
    for quirks in (False, True):
        tower, built = build_vision("decoder", [source], 16, published_quirks=quirks)
        adapter: Any = built
        assert (type(adapter.decoder.blocks[0].mlp.act) is nn.GELU) == quirks
        adapter.decoder.head.load_state_dict(student_of(source).decoder.head.state_dict())
        outputs.append(adapter(tower(pixels())))
    images = clip.normalise(pixels())
    expected = student_of(source).eval()(images, torch.ones(2, 1, 4, dtype=torch.bool))
    assert torch.allclose(outputs[0], expected, atol=1e-5)
    assert not torch.allclose(outputs[1], expected, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_adapter_alone(kind: Any) -> None:
    sources = sides(kind)
    tower, adapter = build_vision(kind, sources, WIDTH)
    with torch.no_grad():  # a zero output layer passes no gradient on
        for parameter in adapter.parameters():
            parameter.add_(0.01)
    adapter.train()(tower(pixels())).square().sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    assert all(parameter.grad is None for parameter in tower.parameters())
    assert all(parameter.grad is None for s in sources for parameter in s.backbone.parameters())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_bfloat16_is_near_float32(kind: Any) -> None:
    tower, adapter = build_vision(kind, sides(kind), WIDTH)
    for parameter in adapter.parameters():
        parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    exact = adapter(tower(pixels()))
    mixed = adapter(tower.to(torch.bfloat16)(pixels()))
    assert mixed.dtype == torch.float32
    rounded = adapter.to(torch.bfloat16)(tower(pixels()))
    assert rounded.dtype == torch.bfloat16
    for result in (mixed, rounded):
        assert (result.float() - exact).norm() < 0.05 * exact.norm()


def test_the_source_models_are_not_touched() -> None:
    for kind in ("decoder", "truncated"):
        source = aligned_source()
        before = {k: v.clone() for k, v in student_of(source).state_dict().items()}
        _, adapter = build_vision(kind, [source], WIDTH)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.fill_(9)
        after = student_of(source).state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(v, before[k]) for k, v in after.items())


def test_adapters_that_do_not_fit_are_refused_by_name() -> None:
    aligned, wide = aligned_source(), tiny_backbone("wide", width=24)
    other = VisionSource(wide)

    def refused(kind: Any, sources: list[VisionSource], reason: str) -> None:
        with pytest.raises(UserError, match=reason):
            build_vision(kind, sources, WIDTH)

    for kind in ("truncated", "decoder", "transformer"):
        refused(kind, [aligned, other], rf"the {kind} adapter takes one backbone, not tiny \+ wide")
    for foreign in (wide, tiny_backbone("large", image_size=32), tiny_backbone("bare", prefix=False)):
        mixed = VisionSource(foreign, aligned=True, student=aligned.student)
        reason = rf"the decoder trained with tiny \(5 tokens of 16 .* does not fit {foreign.name} \("
        refused("decoder", [mixed], reason)
    refused(
        "decoder", [VisionSource(tiny_backbone())], "takes one aligned backbone with its decoder, not tiny"
    )
    refused("fused-decoder", [other, VisionSource(tiny_backbone())], r"with its decoder, not wide \+ tiny")
    refused("fused-decoder", [aligned], "at least one other, not tiny")
    tower = build_tower("fused-decoder", [other, aligned])
    with pytest.raises(
        UserError, match=r"trained with narrow \(5 tokens of 8 .* does not fit tiny \(5 tokens of 16"
    ):
        fused_adapter_from_student(tiny_student(tiny_backbone("narrow", width=8)), tower, WIDTH)
    without = build_student(tiny_backbone(), soft_cap=None, decoder=False)
    source = VisionSource(without.encoder.backbone, aligned=True, student=without)
    refused("decoder", [source], "tiny was aligned without a decoder")
    with pytest.raises(UserError, match=r"unknown adapter 'mpl'; known: linear, mlp.*did you mean 'mlp'"):
        AdapterConfig("mpl", 4, 4, 4)  # type: ignore[arg-type]


def test_truncated_needs_a_plain_vit_with_blocks_to_spare() -> None:
    eva = create_backbone(
        "eva02_tiny_patch14_224",
        weights="none",
        image_size=28,
        model_kwargs={"depth": 3, "embed_dim": 48, "num_heads": 3},
    )
    with pytest.raises(UserError, match="not eva02_tiny_patch14_224, which is a Eva"):
        build_vision("truncated", [VisionSource(eva)], WIDTH)
    with pytest.raises(UserError, match="leaves no block for the tower: tiny has 3 blocks"):
        adapter_from_backbone(tiny_backbone(), WIDTH, published_quirks=True)


def test_the_fit_of_a_given_adapter_and_tower_is_checked() -> None:
    tower = build_tower("mlp", [VisionSource(tiny_backbone())])
    wide = build_tower("mlp", [VisionSource(tiny_backbone("wide", width=24))])
    adapter = fresh_adapter("mlp", tower, WIDTH)
    adapter.config.check_fits(tower)
    with pytest.raises(
        UserError, match=r"the mlp adapter \(4 tokens of 16 .*\) does not fit wide \(4 tokens of 24"
    ):
        adapter.config.check_fits(wide)
    truncated = adapter_from_backbone(tiny_backbone(), WIDTH)
    aligned = build_tower("truncated", [aligned_source()])
    with pytest.raises(UserError, match="holds the last blocks of tiny; it does not fit tiny"):
        truncated.config.check_fits(aligned)
    with pytest.raises(UserError, match="the decoder adapter does not start from scratch"):
        fresh_adapter("decoder", tower, WIDTH)
