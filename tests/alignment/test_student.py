"""The student: initial state, hidden tokens, trained parameters, and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from students import decoder_of
from torch import Tensor, nn

from localign.alignment import export_student, load_student
from localign.alignment.student import Decoder, Student, activation_class, build_student
from localign.backbones import Backbone, create_backbone, load_backbone
from localign.errors import UserError

SMALL: dict[str, Any] = {"depth": 3, "embed_dim": 48, "num_heads": 3}


def backbone_of(name: str = "vit_tiny_patch16_224", size: Any = 32, **kwargs: Any) -> Backbone:
    return create_backbone(name, weights="none", image_size=size, model_kwargs={**SMALL, **kwargs})


def student_of(backbone: Backbone, soft_cap: float | None = 30.0, **options: Any) -> Student:
    torch.manual_seed(0)
    return build_student(backbone, soft_cap=soft_cap, **options)


def trained(backbone: Backbone, **options: Any) -> Student:
    """A student with a non-zero head, and a LayerScale large enough that the decoder's blocks matter."""
    student = student_of(backbone, **{"layer_scale": 0.5, **options})
    nn.init.normal_(student.encoder.head.weight, std=0.5)
    return student


def sample(backbone: Backbone, batch: int = 2, masks: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, *backbone.image_size, generator=generator)
    keep = torch.rand(batch, masks, backbone.num_patches, generator=generator) < 0.5
    keep[:, -1] = True
    return images, keep


@torch.no_grad()
def test_embeddings_are_zero_at_step_zero() -> None:
    backbone = backbone_of()
    student = student_of(backbone)
    images, keep = sample(backbone)
    assert student.encoder(images).abs().max() == 0
    first = student(images, keep)
    assert first.shape == (6, 5, 48)
    assert torch.equal(first, first[:1].expand_as(first))  # the output does not depend on image or mask yet


def test_the_backbone_is_copied_except_its_norm_which_is_new() -> None:
    backbone = backbone_of()
    nn.init.normal_(backbone.vit.norm.weight)
    student = student_of(backbone)
    ours, theirs = student.encoder.backbone.vit.state_dict(), backbone.vit.state_dict()
    assert list(ours) == list(theirs)
    assert {k for k in ours if not torch.equal(ours[k], theirs[k])} == {"norm.weight"}
    norm = student.encoder.backbone.vit.norm
    assert (norm.eps, norm.weight.min(), norm.weight.max(), norm.bias.abs().max()) == (1e-5, 1, 1, 0)
    assert backbone.vit.norm.eps == 1e-6
    assert backbone.soft_cap is None


def test_a_norm_after_pooling_becomes_the_norm_of_every_token() -> None:
    student = student_of(backbone_of(global_pool="avg"))
    vit = student.encoder.backbone.vit
    assert student.encoder.backbone.final_norm == "fc_norm"
    assert vit.fc_norm.eps == 1e-5
    assert isinstance(vit.norm, nn.Identity)
    assert vit.global_pool == ""


@pytest.mark.parametrize(
    ("name", "size", "activation", "qkv_bias"),
    [
        ("vit_tiny_patch16_224", 32, "GELU", True),
        ("vit_base_patch16_clip_quickgelu_224", 32, "QuickGELU", True),
        ("vit_so400m_patch14_siglip_384", 28, "GELU", True),
    ],
)
def test_the_decoder_is_built_as_published(name: str, size: int, activation: str, qkv_bias: bool) -> None:
    backbone = backbone_of(name, size)
    decoder = decoder_of(student_of(backbone, soft_cap=None))
    tokens = backbone.num_prefix_tokens + backbone.num_patches
    assert decoder.pos_embed.shape == (1, tokens, 48)
    assert len(decoder.blocks) == 2
    for block in cast(Any, decoder.blocks):
        assert block.attn.num_heads == 3
        assert (block.attn.qkv.bias is not None) == qkv_bias
        assert block.mlp.fc1.out_features == 4 * 48
        assert type(block.mlp.act).__name__ == activation
        assert block.ls1.gamma.unique().tolist() == pytest.approx([1e-6])
        assert block.ls2.gamma.unique().tolist() == pytest.approx([1e-6])
    assert {m.eps for m in decoder.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert decoder.head.out_features == 48


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_giant_patch14_dinov2"])
def test_packed_gates_give_the_decoder_gates_of_the_same_width(name: str) -> None:
    backbone = backbone_of(name, 28)
    block = cast(Any, decoder_of(student_of(backbone, soft_cap=None)).blocks)[0]
    assert (
        block.mlp.fc1_g.out_features
        == block.mlp.fc1_x.out_features
        == backbone.vit.blocks[0].mlp.fc2.in_features
    )
    assert isinstance(block.mlp.act, nn.SiLU)


def test_the_decoder_of_eva02_has_the_mlps_of_its_encoder() -> None:
    backbone = backbone_of("eva02_base_patch16_clip_224")
    decoder = decoder_of(student_of(backbone, soft_cap=None))
    own = backbone.vit.blocks[0].mlp
    for block in cast(Any, decoder.blocks):
        assert {k: v.shape for k, v in block.mlp.state_dict().items()} == {
            k: v.shape for k, v in own.state_dict().items()
        }
        assert type(block.mlp) is type(own)
        assert block.attn.qkv.bias is not None
    assert {m.eps for m in decoder.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    plain = decoder_of(build_student(backbone, soft_cap=None, decoder_mlp="plain"))
    assert cast(Any, plain.blocks)[0].mlp.fc1.out_features == 4 * 48


@pytest.mark.parametrize("width", [32, 96])
def test_a_decoder_may_be_narrower_or_wider(width: int) -> None:
    backbone = backbone_of()
    student = build_student(backbone, soft_cap=None, decoder_width=width)
    images, keep = sample(backbone)
    assert student(images, keep).shape[-1] == backbone.width
    assert student.encoder.head.out_features == decoder_of(student).pos_embed.shape[-1] == width
    assert decoder_of(student).config.num_heads == width // 16


def test_the_last_blocks_may_start_anew() -> None:
    backbone = backbone_of()
    student = build_student(backbone, soft_cap=None, reinit_blocks=1)
    old, new = backbone.vit.blocks, student.encoder.backbone.vit.blocks
    assert all(torch.equal(a, b) for a, b in zip(old[1].parameters(), new[1].parameters(), strict=True))
    assert not torch.equal(old[2].mlp.fc1.weight, new[2].mlp.fc1.weight)
    assert new[2].mlp.fc1.weight.std().item() == pytest.approx(0.0176, rel=0.1)  # truncated at two deviations


def test_position_embeddings_are_drawn_with_standard_deviation_002() -> None:
    decoder = decoder_of(student_of(backbone_of(size=224)))
    assert decoder.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(decoder.pos_embed.mean().item()) < 1e-3


@torch.no_grad()
def test_prefix_tokens_are_hidden_from_the_decoder_but_reconstructed() -> None:
    backbone = backbone_of("vit_small_patch14_reg4_dinov2", 28)
    student = trained(backbone)
    images, keep = sample(backbone)
    embeddings = student.encoder(images)
    reconstruction = student.decode(embeddings, keep)
    assert reconstruction.shape[1] == 5 + 4
    changed = embeddings.clone()
    changed[:, :5] += 100
    assert torch.equal(student.decode(changed, keep), reconstruction)
    changed[:, 5:] += 1
    assert not torch.allclose(student.decode(changed, keep), reconstruction)


@torch.no_grad()
def test_each_view_is_decoded_from_its_own_visible_embeddings() -> None:
    backbone = backbone_of()
    student = trained(backbone)
    images, keep = sample(backbone)
    embeddings = student.encoder(images)
    for image in range(2):
        for mask in range(3):
            tokens = embeddings[image].clone()
            tokens[0] = 0
            tokens[1:][~keep[image, mask]] = 0
            alone = decoder_of(student)(tokens[None])[0]
            assert torch.allclose(student(images, keep)[3 * image + mask], alone, atol=1e-5)


def test_embeddings_of_hidden_patches_get_no_gradient() -> None:
    backbone = backbone_of()
    student = trained(backbone)
    images, keep = sample(backbone, masks=1)
    keep[:] = torch.tensor([True, False, False, True])
    embeddings = student.encoder(images).detach().requires_grad_()
    student.decode(embeddings, keep).square().sum().backward()
    assert embeddings.grad is not None
    touched = embeddings.grad.abs().sum(-1) > 0
    assert touched.tolist() == [[False, True, False, False, True]] * 2


def gradients(student: Student, images: Tensor, keep: Tensor) -> dict[str, Tensor]:
    student.zero_grad()
    student(images, keep).square().mean().backward()
    return {k: p.grad.clone() for k, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "eva02_base_patch16_clip_224"]
)
def test_recomputing_activations_gives_the_same_gradients(name: str) -> None:
    backbone = backbone_of(name)
    student = trained(backbone, soft_cap=30.0 if name.startswith("vit") else None).train()
    images, keep = sample(backbone)
    plain = gradients(student, images, keep)
    student.set_grad_checkpointing(True)
    again = gradients(student, images, keep)
    assert plain.keys() == again.keys()
    assert len(plain) == sum(1 for _ in student.parameters())
    assert all(torch.allclose(plain[k], again[k], atol=1e-6) for k in plain)


def test_training_the_last_blocks_freezes_everything_before_them() -> None:
    backbone = backbone_of()
    student = trained(backbone)
    student.train_last_blocks(1)
    images, keep = sample(backbone)
    got = set(gradients(student, images, keep))
    prefixes = ("encoder.backbone.vit.blocks.2.", "encoder.backbone.vit.norm.", "encoder.head.", "decoder.")
    assert got == {k for k, _ in student.named_parameters() if k.startswith(prefixes)}
    student.train_last_blocks(0)
    got = set(gradients(student, images, keep))
    assert got == {k for k, _ in student.named_parameters() if k.startswith(prefixes[1:])}
    for count in (-1, 4):
        with pytest.raises(UserError, match=f"--train-blocks {count}"):
            student.train_last_blocks(count)


def test_a_student_of_a_frozen_backbone_trains() -> None:
    backbone = backbone_of().requires_grad_(False)
    assert all(p.requires_grad for p in student_of(backbone).parameters())
    assert not any(p.requires_grad for p in backbone.parameters())


def test_a_soft_cap_inside_the_backbone_cannot_be_undone() -> None:
    capped = backbone_of().copy(soft_cap=30.0)
    with pytest.raises(UserError, match="cannot undo"):
        student_of(capped, soft_cap=None)
    assert student_of(capped, soft_cap=10.0).encoder.backbone.soft_cap == 10.0


@pytest.mark.parametrize(
    ("name", "size", "soft_cap", "options"),
    [
        ("vit_tiny_patch16_224", 32, 30.0, {}),
        ("vit_small_patch14_reg4_dinov2", 28, None, {"decoder_depth": 1, "layer_scale": None}),
        ("vit_so400m_patch14_siglip_384", 45, 30.0, {"teacher_width": 64}),
        ("vit_base_patch16_clip_quickgelu_224", 32, 30.0, {}),
        ("beit_base_patch16_224", 32, None, {}),
    ],
)
@torch.no_grad()
def test_an_exported_student_is_restored_bitwise(
    name: str, size: int, soft_cap: float | None, options: dict[str, Any], tmp_path: Path
) -> None:
    backbone = backbone_of(name, size)
    student = trained(backbone, soft_cap=soft_cap, **options).eval()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    export_student(student, tmp_path)
    loaded = load_student(tmp_path)
    images, keep = sample(backbone)
    assert torch.equal(loaded(images, keep), student(images, keep))
    assert not loaded.training
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_an_export_without_a_decoder_cannot_be_loaded_as_a_student(tmp_path: Path) -> None:
    export_student(student_of(backbone_of()), tmp_path, decoder=False)
    with pytest.raises(UserError, match="without a decoder"):
        load_student(tmp_path)
    export_student(student_of(backbone_of()), tmp_path)
    (tmp_path / "decoder.safetensors").unlink()
    with pytest.raises(UserError, match="without a decoder"):
        load_student(tmp_path)


@torch.no_grad()
def test_a_student_without_a_decoder_returns_its_embeddings(tmp_path: Path) -> None:
    backbone = backbone_of()
    images, keep = sample(backbone)
    student = student_of(backbone, decoder=False)
    assert student.decoder is None
    assert torch.equal(student(images), torch.zeros(2, 5, 48))
    with pytest.raises(ValueError, match="no decoder"):
        student(images, keep)
    student.set_grad_checkpointing(True)
    export_student(student, tmp_path)
    assert not (tmp_path / "decoder.safetensors").exists()
    with pytest.raises(UserError, match="without a decoder"):
        load_student(tmp_path)
    ours, theirs = student.encoder.backbone.eval(), load_backbone(tmp_path)
    assert torch.equal(ours.tokens(images), theirs.tokens(images))


@torch.no_grad()
def test_a_head_can_start_as_the_identity() -> None:
    backbone = backbone_of()
    student = student_of(backbone, decoder=False, head="identity")
    images, _ = sample(backbone)
    torch.testing.assert_close(student(images), student.encoder.backbone.tokens(images))


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(UserError, match="Gelu"):
        activation_class("Gelu")
    assert isinstance(Decoder(decoder_of(student_of(backbone_of())).config), Decoder)
