"""LLaVA models: their tower and adapter are swapped, and ours are written as theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_folders import FORMATS, folder_of, naflex_folder, timm_folder
from tiny_vlm import tiny_backbone, tiny_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
)
from vlm_models import picture, tiny_student
from vlm_runs import arguments, without_llm

from localign.alignment import export_student
from localign.cli import main
from localign.portable.modeling_localign_vlm import LocalignVLMForConditionalGeneration
from localign.vlm import LocalignVLMProcessor
from localign.vlm.model.build import load_vlm

SIDE, PATCH = 16, 8


def llava_folder(folder: Path, tower: str = "clip", **config: Any) -> Path:
    """A random LLaVA model of two blocks and its processor."""
    sizes: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": PATCH,
    }  # fmt: skip
    vision: Any = CLIPVisionConfig(**sizes) if tower == "clip" else SiglipVisionConfig(**sizes)
    text = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=259, initializer_range=0.2,
    )  # fmt: skip
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    strategy = "default" if tower == "clip" else "full"
    torch.manual_seed(2)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            **{
                "vision_config": vision,
                "text_config": text,
                "image_token_index": 260,
                "vision_feature_select_strategy": strategy,
                "image_seq_length": 4,
                **config,
            }
        )
    )
    for name, parameter in model.named_parameters():
        if "vision_tower" in name or "projector" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1 if tower == "clip" else 0,
    ).save_pretrained(folder)
    return folder


def aligned(folder: Path) -> Path:
    """An export of a random alignment, soft-capped."""
    return export_student(tiny_student(), folder, provenance={"command": "align"})


def swap(*options: object) -> int:
    return main(["vlm", "swap", *map(str, options)])


def as_llava(folder: Path, out: Path) -> int:
    """Export a model as a LLaVA model; returns the exit code."""
    return main(["vlm", "export", str(folder), "--format", "llava", "--dtype", "float32", "--out", str(out)])


def batch() -> tuple[Tensor, Tensor]:
    """Ids with the tokens of an image, and its pixels."""
    pixels = torch.randint(0, 256, (1, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(7))
    return torch.tensor([[0, *[260] * 4, 40, 41, 42]]), pixels.to(torch.uint8)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("layer", [-1, -2, 2])
@torch.no_grad()
def test_its_own_tower_and_projector_give_its_own_logits(tower: str, layer: int, tmp_path: Path) -> None:
    folder = llava_folder(tmp_path / "llava", tower, vision_feature_layer=layer)
    assert swap(folder, "--backbone", folder, "--adapter", "keep", "--out", tmp_path / "ours") == 0
    model, _ = load_vlm(tmp_path / "ours")
    ids, pixels = batch()
    theirs = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    images = model.vision.backbones[0].normalise(pixels)
    expected = theirs(input_ids=ids, pixel_values=images).logits
    found = model(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.1
    assert model.config.resize == "crop"
    assert model.config.image_token_id == 260


@torch.no_grad()
def test_the_decoder_comes_along_and_stage_align_trains_it(data: Path, tmp_path: Path) -> None:
    folder, run = llava_folder(tmp_path / "llava"), aligned(tmp_path / "aligned")
    assert swap(folder, "--backbone", run, "--out", tmp_path / "ours") == 0
    model, _ = load_vlm(tmp_path / "ours")
    tower = model.vision.configs[0]
    assert (tower.layer, tower.norm, tower.keep_prefix) == (2, True, True)
    assert model.adapter.config.kind == "decoder"
    student = tiny_student()
    adapter: Any = model.adapter
    assert torch.equal(adapter.in_proj.weight, student.encoder.head.weight)
    theirs = LlavaForConditionalGeneration.from_pretrained(folder)
    base = theirs.model.language_model
    assert torch.equal(
        model.language_model.model.layers[1].mlp.up_proj.weight, base.layers[1].mlp.up_proj.weight
    )
    init = ["--init", str(tmp_path / "ours"), "--stage", "align", "--steps", "2", "--max-length", "400"]
    with torch.enable_grad():
        assert main(without_llm(arguments(data, tmp_path / "run", *init))) == 0
    trained: Any = LocalignVLMForConditionalGeneration.from_pretrained(tmp_path / "run" / "export")
    trained.eval()
    ids, pixels = batch()
    ids = torch.cat([ids[:, :1], torch.full((1, 1), 260), ids[:, 1:]], dim=1)  # the class token is kept
    ours: Any = load_vlm(tmp_path / "run")[0].eval()  # type: ignore[no-untyped-call]
    assert torch.equal(trained(ids, pixels).logits, ours(ids, pixels).logits)


@pytest.mark.parametrize("adapter", ["linear", "mlp", "transformer", "truncated"])
def test_new_adapters(adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = llava_folder(tmp_path / "llava")
    assert swap(folder, "--backbone", folder, "--adapter", adapter, "--out", tmp_path / "ours") == 0
    model, _ = load_vlm(tmp_path / "ours")
    assert model.adapter.config.kind == adapter
    assert "vlm train --init" in capsys.readouterr().out


@pytest.mark.parametrize("resize", ["auto", "naive", "letterbox"])
@torch.no_grad()
def test_it_comes_back_as_a_llava_model(
    resize: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = llava_folder(tmp_path / "llava", vision_feature_layer=-2)
    assert (
        swap(
            folder, "--backbone", folder, "--adapter", "keep", "--resize", resize, "--out", tmp_path / "ours"
        )
        == 0
    )
    back = tmp_path / "back"
    assert as_llava(tmp_path / "ours", back) == 0
    assert "logits within" in capsys.readouterr().out
    assert json.loads((back / "config.json").read_text())["model_type"] == "llava"
    assert 'pipeline("image-text-to-text", model="back")' in (back / "README.md").read_text()
    theirs = AutoModelForImageTextToText.from_pretrained(back).eval()
    ours, tokenizer = load_vlm(tmp_path / "ours")
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture(3, (40, 22))}, {"type": "text", "text": "What?"}],
        }
    ]
    options: dict[str, Any] = {
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
        "add_generation_prompt": True,
    }
    expected = LocalignVLMProcessor.for_model(ours, tokenizer).apply_chat_template(chat, **options)
    found = AutoProcessor.from_pretrained(back).apply_chat_template(chat, **options)
    assert found["input_ids"].tolist() == expected["input_ids"].tolist()
    pixels = ours.vision.backbones[0].normalise(expected["pixel_values"])
    assert (found["pixel_values"] - pixels).abs().max() < 0.05  # one or two levels of 255
    found["pixel_values"] = pixels
    torch.testing.assert_close(theirs(**found).logits, ours(**expected).logits, atol=1e-5, rtol=0)


REGISTERS = {"dinov2-registers", "dinov3", "dinov3-gated", "dinov3-unbiased"}
"""Towers with more prefix tokens than a stock LLaVA model drops."""
IN = [*FORMATS, "clip-gelu", "llava-clip", "timm", "naflex"]


@pytest.mark.parametrize("name", IN)
@torch.no_grad()
def test_towers_of_every_family_go_in_and_out(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = llava_folder(tmp_path / "llava")
    if name == "timm":
        tower = timm_folder(tmp_path / "t", num_classes=0)
    else:
        tower = (
            naflex_folder("siglip", tmp_path / "t") if name == "naflex" else folder_of(name, tmp_path / "t")
        )[1]
    assert swap(folder, "--backbone", tower, "--adapter", "mlp", "--out", tmp_path / "ours") == 0
    ours, _ = load_vlm(tmp_path / "ours")
    twin: Any = LocalignVLMForConditionalGeneration.from_pretrained(tmp_path / "ours")
    ids = torch.tensor([[0, *[260] * ours.vision.num_tokens, 40, 41, 42]])
    pixels = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(7)).to(torch.uint8)
    expected = ours(input_ids=ids, pixel_values=pixels).logits
    assert torch.equal(twin.eval()(ids, pixels).logits, expected)
    back = tmp_path / "back"
    capsys.readouterr()
    assert as_llava(tmp_path / "ours", back) == (2 if name in REGISTERS else 0)
    if name not in REGISTERS:
        theirs = LlavaForConditionalGeneration.from_pretrained(back).eval()
        images = ours.vision.backbones[0].normalise(pixels)
        found = theirs(input_ids=ids, pixel_values=images).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    else:
        assert len(capsys.readouterr().err.splitlines()) == 1


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(lines) == 1, lines
    return lines[0]


def test_what_llava_cannot_compute_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, run = llava_folder(tmp_path / "llava"), aligned(tmp_path / "aligned")
    cases = {"decoder": "an mlp adapter, not tiny and decoder", "mlp": "applies its final norm"}
    for adapter, reason in cases.items():
        assert swap(folder, "--backbone", run, "--adapter", adapter, "--out", tmp_path / adapter) == 0
        capsys.readouterr()
        out = tmp_path / "back"
        code = main(["vlm", "export", str(tmp_path / adapter), "--format", "llava", "--out", str(out)])
        assert reason in refused(capsys, code)
        assert not (out / "config.json").exists()
    assert swap(folder, "--backbone", run, "--adapter", "keep", "--out", tmp_path / "capped") == 0
    capsys.readouterr()
    code = main(
        ["vlm", "export", str(tmp_path / "capped"), "--format", "llava", "--out", str(tmp_path / "back")]
    )
    assert "has soft-capped attention" in refused(capsys, code)


def test_bad_parts_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = llava_folder(tmp_path / "llava")
    other = tmp_path / "gpt2"
    GPT2Config().save_pretrained(other)
    assert "is a gpt2, not a LLaVA model" in refused(capsys, swap(other, "--backbone", folder))
    assert "one backbone" in refused(capsys, swap(folder))
    assert "takes several" in refused(capsys, swap(folder, "--backbone", folder, "--adapter", "fused-mlp"))
    assert "its decoder" in refused(capsys, swap(folder, "--backbone", folder, "--out", tmp_path / "x"))
    wide = tmp_path / "wide"
    export_student(tiny_student(tiny_backbone(width=24)), wide)
    line = refused(capsys, swap(folder, "--backbone", wide, "--adapter", "keep", "--out", tmp_path / "x"))
    assert "tokens of 16 channels" in line
    several = llava_folder(tmp_path / "several", vision_feature_layer=[-2, -1])
    line = refused(capsys, swap(several, "--backbone", folder, "--adapter", "keep", "--out", tmp_path / "x"))
    assert "several blocks" in line
    assert not (tmp_path / "x").exists()
