"""A saved model is a transformers folder: transformers' own calls load the same model in another process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_vlm import TEXT_WIDTH, tiny_llm, tiny_tokenizer
from torch import Tensor
from vlm_models import QUESTIONS, mixed_records, packed, picture, tiny_processor, tiny_vlm

from localign.backbones import Backbone
from localign.backbones.building import build_vit
from localign.errors import UserError
from localign.vlm import LocalignVLM
from localign.vlm.model.adapters import fresh_adapter
from localign.vlm.model.vision import TowerConfig, VisionTower

IMAGES = [1, None, 2, None]

ELSEWHERE = """
import json, socket, sys
def refuse(*_): raise RuntimeError("fetched something")
socket.socket.connect = refuse
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
import localign.vlm
questions, images, folders = json.loads(sys.stdin.read())
for folder in folders:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    opened = [image and Image.open(image) for image in images]
    batch = processor(text=questions, images=opened, return_tensors="pt")
    print(json.dumps(model.generate(**batch, max_new_tokens=8, do_sample=False).tolist()))
"""


def save(model: LocalignVLM, tokenizer: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    tiny_processor(model, tokenizer).save_pretrained(folder)
    return folder


def assert_equal_weights(model: LocalignVLM, other: LocalignVLM) -> None:
    expected, found = model.state_dict(), other.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_answers(tmp_path: Path) -> None:
    files = [None if seed is None else str(tmp_path / f"{seed}.png") for seed in IMAGES]
    for seed, file in zip(IMAGES, files, strict=True):
        if seed is not None and file is not None:
            picture(seed).save(file)
    expected, folders = [], []
    for kind in ("llama", "qwen"):
        model, tokenizer = tiny_vlm(kind, tie_word_embeddings=kind == "qwen")
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        records = packed(mixed_records(model, tokenizer))
        for _ in range(3):
            optimizer.zero_grad()
            model(**records).loss.backward()
            optimizer.step()
        model.eval()  # type: ignore[no-untyped-call]
        folders.append(str(save(model, tokenizer, tmp_path / kind)))
        images = [None if seed is None else picture(seed) for seed in IMAGES]
        batch = tiny_processor(model, tokenizer)(text=QUESTIONS, images=images)
        expected.append(model.generate(**batch, max_new_tokens=8, do_sample=False).tolist())
    result = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        input=json.dumps([QUESTIONS, files, folders]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert [json.loads(line) for line in result.stdout.splitlines()] == expected


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_every_weight_comes_back(kind: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_vlm(kind, adapter="transformer", tie_word_embeddings=kind == "qwen")
    with torch.no_grad():
        for parameter in model.vision.parameters():
            parameter.add_(0.1)  # so that the weights differ from any initialisation
    save(model, tokenizer, tmp_path / "whole")
    save(model, tokenizer, tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    for folder in ("whole", "parts"):
        loaded = LocalignVLM.from_pretrained(tmp_path / folder)
        assert_equal_weights(model, loaded)
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded.vision.parameters())
        assert all(p.requires_grad for p in loaded.adapter.parameters())
        assert loaded.generation_config.to_dict() == model.generation_config.to_dict() | {
            "transformers_version": loaded.generation_config.transformers_version
        }
    records = packed(mixed_records(model, tokenizer))
    with torch.no_grad():
        assert torch.equal(loaded(**records).loss, model(**records).loss)


def test_loading_in_bfloat16_reaches_every_part(tmp_path: Path) -> None:
    model, tokenizer = tiny_vlm()
    loaded = LocalignVLM.from_pretrained(save(model, tokenizer, tmp_path), dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    batch = tiny_processor(loaded, tokenizer)(text=QUESTIONS[0], images=picture(1))
    assert loaded(**batch).logits.dtype == torch.bfloat16


def test_a_model_saved_in_bfloat16_loads_in_bfloat16(tmp_path: Path) -> None:
    model, tokenizer = tiny_vlm()
    model.language_model.to(torch.bfloat16)
    loaded = LocalignVLM.from_pretrained(save(model, tokenizer, tmp_path))
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("architecture", "kwargs"),
    [
        ("eva02_tiny_patch14_224", {"img_size": 28, "patch_size": 14}),
        ("beit_base_patch16_224", {"img_size": 32}),
    ],
    ids=["rotary", "relative"],
)
def test_position_buffers_that_no_file_holds_are_recomputed(
    architecture: str, kwargs: dict[str, Any], tmp_path: Path
) -> None:
    kwargs = {**kwargs, "embed_dim": 24, "depth": 2, "num_heads": 2}
    vit = build_vit(architecture, kwargs, pretrained=False)
    backbone = Backbone(vit, name="tiny", architecture=architecture, model_kwargs=kwargs).eval()
    tower = VisionTower([TowerConfig.of(backbone, layer=-1, norm=True, keep_prefix=False)], [backbone])
    tokenizer = tiny_tokenizer()
    parts = tower, fresh_adapter("mlp", tower, TEXT_WIDTH), tiny_llm()
    model = LocalignVLM.from_parts(*parts, tokenizer)
    loaded = LocalignVLM.from_pretrained(save(model, tokenizer, tmp_path))
    saved = load_file(tmp_path / "model.safetensors")
    computed = {n: b for n, b in model.vision.named_buffers() if f"vision.{n}" not in saved}
    assert computed
    for name, buffer in loaded.vision.named_buffers():
        if name in computed:
            assert torch.equal(buffer, computed[name]), name
    pixels = torch.randint(0, 256, (1, 3, *tower.image_size), dtype=torch.uint8)
    model.eval()  # type: ignore[no-untyped-call]
    assert torch.equal(loaded.get_image_features(pixels), model.get_image_features(pixels))


Change = Callable[[dict[str, Tensor]], None]


def edited(folder: Path, change: Change) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(*tiny_vlm(), tmp_path_factory.mktemp("saved"))


def test_weights_that_do_not_cover_the_model_are_named(
    saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def without_tower(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("model.vision.")]:
            del tensors[name]

    def with_more(tensors: dict[str, Tensor]) -> None:
        tensors["model.adapter.mlp.9.weight"] = torch.zeros(2)

    def with_another_shape(tensors: dict[str, Tensor]) -> None:
        tensors["model.adapter.mlp.0.bias"] = torch.zeros(3)

    cases: dict[str, tuple[Change, str]] = {
        "a": (without_tower, r"\d+ of \d+ tensors are missing \(vision\.towers\.0.* and \d+ more\)"),
        "b": (with_more, r"unexpected tensors \(adapter\.mlp\.9\.weight\)"),
        "c": (with_another_shape, r"tensors of the wrong shape \(adapter\.mlp\.0\.bias\)"),
    }
    for name, (change, message) in cases.items():
        folder = edited(Path(shutil.copytree(saved, tmp_path / name)), change)
        capfd.readouterr()
        with pytest.raises(UserError, match=message) as caught:
            LocalignVLM.from_pretrained(folder)
        assert "\n" not in str(caught.value)
        assert "LOAD REPORT" not in "".join(capfd.readouterr())


def test_a_truncated_weight_file_is_one_line(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "cut"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="are damaged"):
        LocalignVLM.from_pretrained(folder)


def test_loading_info_and_attention_are_options(saved: Path) -> None:
    model, info = LocalignVLM.from_pretrained(saved, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"]
    assert model.language_model.config._attn_implementation == "eager"
