"""Exports answer in processes without localign, and as servers such as vLLM ask them."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny_vlm import TEXT_WIDTH, tiny_llm, tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from vlm_models import KINDS, picture, sides, tiny_processor, tiny_tower, tiny_vlm

from localign import portable
from localign.alignment.student import Decoder, DecoderConfig
from localign.backbones import Backbone
from localign.backbones.building import build_vit
from localign.portable.modeling_localign_vlm import (
    LocalignVLMForConditionalGeneration,
    LocalignVLMModel,
    PatchDecoder,
)
from localign.portable.processing_localign_vlm import LocalignProcessor
from localign.vlm import LocalignVLM, LocalignVLMProcessor
from localign.vlm.data.vocabulary import add_special_tokens
from localign.vlm.model.adapters import fresh_adapter
from localign.vlm.model.build import load_vlm, save_vlm
from localign.vlm.model.presets import build_vision
from localign.vlm.model.vision import TowerConfig, VisionTower

CODE = Path(portable.__file__).parent
CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

ELSEWHERE = """
import json, socket, sys
sys.modules["localign"] = None
def refuse(*_): raise RuntimeError("fetched something")
socket.socket.connect = refuse
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
image, folders = json.loads(sys.stdin.read())
for folder in folders:
    own = {"trust_remote_code": True}
    model = AutoModelForImageTextToText.from_pretrained(folder, **own)
    processor = AutoProcessor.from_pretrained(folder, **own)
    part = {"type": "image", "image": Image.open(image)}
    chat = [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    batch = processor.apply_chat_template(chat, **options)
    print(json.dumps(model.generate(**batch, max_new_tokens=8, do_sample=False).tolist()))
    answer = pipeline("image-text-to-text", model=folder, **own)(text=chat, max_new_tokens=8, do_sample=False)
    print(json.dumps(answer[0]["generated_text"][-1]["content"]))
"""


def loaded(folder: Path) -> LocalignVLMForConditionalGeneration:
    load: Any = LocalignVLMForConditionalGeneration.from_pretrained
    model, info = load(folder, output_loading_info=True)
    assert not any(info.values()), info
    return cast(LocalignVLMForConditionalGeneration, model.eval())


def batch_of(model: LocalignVLM, tokenizer: Any) -> dict[str, Tensor]:
    texts, images = ["What is it?", "How many?"], [picture(1), picture(2)]
    return dict(tiny_processor(model, tokenizer)(text=texts, images=images))


def assert_same(model: LocalignVLM, tokenizer: Any, folder: Path) -> None:
    """The portable model gives the model's own logits, with and without images."""
    save_vlm(model, tiny_processor(model, tokenizer), folder)
    twin, batch = loaded(folder), batch_of(model, tokenizer)
    text = {"input_ids": torch.arange(3, 9)[None]}
    with torch.no_grad():
        for inputs in (batch, text):
            assert torch.equal(twin(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_gives_the_same_logits(kind: Any, tmp_path: Path) -> None:
    tower, adapter = build_vision(kind, sides(kind), TEXT_WIDTH, seed=4)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter))
    tokenizer = tiny_tokenizer()
    model = LocalignVLM.from_parts(tower, adapter, tiny_llm(), tokenizer).eval()  # type: ignore[no-untyped-call]
    assert_same(model, tokenizer, tmp_path)


@pytest.mark.parametrize("gated", [(None, False), (32, False), (32, True)])
def test_decoders_with_plain_and_gated_mlps_are_the_same(gated: tuple[int | None, bool]) -> None:
    config = DecoderConfig(24, 12, 2, 5, gated_width=gated[0], gated_norm=gated[1], activation="SiLU")
    ours, twin = Decoder(config), PatchDecoder(asdict(config))
    twin.load_state_dict(ours.state_dict())
    tokens = torch.randn(2, 5, 24)
    assert torch.equal(ours(tokens), twin(tokens))


TOWERS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "rotary positions, a buffer in no file": ("eva02_tiny_patch14_224", {}, True),
    "relative positions": ("beit_base_patch16_224", {"use_rel_pos_bias": True}, True),
    "quick GELU, norm before the blocks": ("vit_base_patch16_clip_quickgelu_224", {}, False),
    "registers, layer scale": ("vit_small_patch14_reg4_dinov2", {}, True),
    "another epsilon": ("vit_tiny_patch16_224", {"norm_eps": 1e-3}, True),
}


@pytest.mark.parametrize("case", TOWERS)
@pytest.mark.parametrize("keep_prefix", [False, True])
def test_towers_of_every_kind(case: str, keep_prefix: bool, tmp_path: Path) -> None:
    name, kwargs, norm = TOWERS[case]
    kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, **kwargs}
    torch.manual_seed(1)
    vit = build_vit(name, kwargs, pretrained=False)
    backbone = Backbone(vit, name=case, architecture=name, model_kwargs=kwargs, std=(0.3, 0.4, 0.5)).eval()
    tower = VisionTower([TowerConfig.of(backbone, layer=-2, norm=norm, keep_prefix=keep_prefix)], [backbone])
    tokenizer = tiny_tokenizer()
    adapter = fresh_adapter("mlp", tower, TEXT_WIDTH)
    model = LocalignVLM.from_parts(tower, adapter, tiny_llm(), tokenizer).eval()  # type: ignore[no-untyped-call]
    assert_same(model, tokenizer, tmp_path)


LLMS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True, "num_key_value_heads": 2},
    "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 8},  # bounded logits
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 4.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},  # other names
    "gpt_neox": {},
    "phi": {},  # an output layer with a bias
}


@pytest.mark.parametrize("kind", LLMS)
def test_language_models_of_every_kind(kind: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = tiny_tokenizer()
    ids = {"vocab_size": 259, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **({} if kind == "gpt2" else sizes), **ids, **LLMS[kind])
    )
    tower = tiny_tower()
    adapter = fresh_adapter("mlp", tower, TEXT_WIDTH)
    model = LocalignVLM.from_parts(tower, adapter, llm, tokenizer).eval()  # type: ignore[no-untyped-call]
    assert_same(model, tokenizer, tmp_path)
    again, _ = load_vlm(tmp_path)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_a_process_without_localign_gives_the_same_answers(tmp_path: Path) -> None:
    image = picture(3)
    image.save(tmp_path / "image.png")
    expected, folders = [], []
    for kind in ("llama", "qwen"):
        model, tokenizer = tiny_vlm(kind, "transformer", tie_word_embeddings=kind == "qwen")
        processor = tiny_processor(model, tokenizer)
        folders.append(str(save_vlm(model, processor, tmp_path / kind)))
        batch = processor(text="What is it?", images=image)
        ids = model.generate(**batch, max_new_tokens=8, do_sample=False)
        new = ids[0, batch["input_ids"].shape[1] :]
        expected += [ids.tolist(), processor.decode(new, skip_special_tokens=True)]  # type: ignore[no-untyped-call]
    result = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        input=json.dumps([str(tmp_path / "image.png"), folders]),
        capture_output=True,
        text=True,
        env={"PATH": "", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert [json.loads(line) for line in result.stdout.splitlines()] == expected


def test_the_code_of_its_card_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = tiny_vlm("llama", "transformer")
    processor = tiny_processor(model, tokenizer)
    save_vlm(model, processor, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    monkeypatch.chdir(tmp_path)
    image = picture(3)
    exec(card.partition("```python\n")[2].partition("```")[0], {"image": image, "question": "What is it?"})
    batch = processor(text="What is it?", images=image)
    ids = model.generate(**batch, max_new_tokens=64, do_sample=False)
    new = ids[0, batch["input_ids"].shape[1] :]
    said = processor.decode(new, skip_special_tokens=True)  # type: ignore[no-untyped-call]
    assert capsys.readouterr().out == said + "\n"


def test_without_trust_nothing_of_the_folder_runs(tmp_path: Path) -> None:
    model, tokenizer = tiny_vlm()
    folder = save_vlm(model, tiny_processor(model, tokenizer), tmp_path / "export")
    code = f"from transformers import AutoModelForImageTextToText as A; A.from_pretrained({str(folder)!r})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, input="n\n", check=False
    )
    assert result.returncode == 1
    assert "trust_remote_code" in result.stderr
    (folder / "modeling_localign_vlm.py").write_text("raise SystemExit('the folder ran')")
    load_vlm(folder)


def test_the_code_is_that_of_the_package_and_imports_nothing_of_it(tmp_path: Path) -> None:
    model, tokenizer = tiny_vlm()
    save_vlm(model, tiny_processor(model, tokenizer), tmp_path)
    for module in portable.VLM:
        code = (CODE / f"{module}.py").read_text()
        assert (tmp_path / f"{module}.py").read_text() == code
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert node.module in portable.VLM
            elif isinstance(node, ast.ImportFrom | ast.Import):
                assert "localign" not in ast.unparse(node)


# -- the processor --------------------------------------------------------------------------------------------


def processors(**options: Any) -> tuple[LocalignVLMProcessor, LocalignProcessor]:
    tokenizer = tiny_tokenizer(bos=options.pop("bos", True))
    tokenizer.chat_template = CHATML
    add_special_tokens(tokenizer)
    sizes = {"image_size": (16, 24), "num_image_tokens": 5, **options}
    return LocalignVLMProcessor(tokenizer, **sizes), LocalignProcessor(tokenizer, **sizes)


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


CHATS: dict[str, list[dict[str, Any]]] = {
    "one question": [{"role": "user", "content": [{"type": "image"}, text("What is it?")]}],
    "the image last": [{"role": "user", "content": [text(" What\nis <image> it? "), {"type": "image"}]}],
    "no image": [{"role": "user", "content": "What?"}],
    "turns": [
        {"role": "user", "content": [text("What?"), text("And where?"), {"type": "image"}]},
        {"role": "assistant", "content": [text("A kite.")]},
        {"role": "user", "content": "Sure?"},
    ],
}


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("prompt_format", ["in-out", "vicuna", "chat-template"])
@pytest.mark.parametrize("case", CHATS)
def test_chats_become_the_tokens_of_training(case: str, prompt_format: str, bos: bool) -> None:
    ours, theirs = processors(prompt_format=prompt_format, bos=bos)
    options: dict[str, Any] = {
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
        "add_generation_prompt": True,
    }
    chat = [dict(message) for message in CHATS[case]]
    for message in chat:
        if isinstance(message["content"], list):
            message["content"] = [
                part | ({"image": picture(1)} if part["type"] == "image" else {})
                for part in message["content"]
            ]
    expected, found = ours.apply_chat_template(chat, **options), theirs.apply_chat_template(chat, **options)
    assert found["input_ids"].tolist() == expected["input_ids"].tolist()
    assert ("pixel_values" in found) == ("pixel_values" in expected) == (case != "no image")


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["naive", "letterbox", "crop"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "upside down", "tiny"])
def test_images_become_the_pixels_of_training(resize: str, mode: str, interpolation: str) -> None:
    ours, theirs = processors(resize=resize, mean=(0.2, 0.4, 0.6), interpolation=interpolation)
    image = picture(4, (3, 2) if mode == "tiny" else (60, 31))
    if mode == "upside down":
        image.getexif()[0x0112] = 3
    elif mode == "RGBA":
        image.putalpha(Image.fromarray(np.tile(np.arange(60, dtype=np.uint8) * 4, (31, 1))))
    elif mode != "tiny":
        image = image.convert(mode)
    expected = ours.image_transform()(ours_rgb(image))
    assert torch.equal(theirs.image_processor(image)["pixel_values"][0], expected)


def ours_rgb(image: Image.Image) -> Image.Image:
    from localign.vlm.data.images import open_image

    return open_image(image)


def test_saving_it_again_keeps_the_tokenizers_own_template(tmp_path: Path) -> None:
    _, processor = processors(prompt_format="chat-template")
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == CHATML


# -- what vLLM's transformers back-end asks for ----------------------------------------------------------------


def test_the_processor_says_where_images_are_and_how_long() -> None:
    _, processor = processors()
    assert processor._get_num_multimodal_tokens(image_sizes=[(100, 20), (7, 7)]) == {
        "num_image_tokens": [5, 5],
        "num_image_patches": [1, 1],
    }
    assert processor.image_processor.size == {"height": 16, "width": 24}
    batch = processor(text="<image>In: a\nOut:", images=[picture(1)], return_text_replacement_offsets=True)
    (entry,) = batch["text_replacement_offsets"][0]
    assert (entry["type"], entry["replacement"], entry["span"]) == ("image", "<image>" * 5, (0, 7))
    assert processor.image_token == "<image>"


def test_the_base_model_is_apart_from_its_output_layer(tmp_path: Path) -> None:
    model, tokenizer = tiny_vlm(adapter="transformer")
    save_vlm(model, tiny_processor(model, tokenizer), tmp_path)
    base: Any = LocalignVLMModel.from_pretrained(tmp_path).eval()  # type: ignore[no-untyped-call]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names == {f"model.{name}" for name in base.state_dict()} | {"lm_head.weight"}
    assert base.get_decoder() is base.language_model
    batch = batch_of(model, tokenizer)
    features = base.get_image_features(batch["pixel_values"], return_dict=True).pooler_output
    with torch.no_grad():
        assert torch.equal(features, model.get_image_features(batch["pixel_values"]))
    config = json.loads((tmp_path / "config.json").read_text())
    assert {"AutoConfig", "AutoModel", "AutoModelForImageTextToText"} <= config["auto_map"].keys()
    assert config["architectures"] == ["LocalignVLMForConditionalGeneration"]
    for served in (LocalignVLMForConditionalGeneration, LocalignVLMModel):
        assert served.is_backend_compatible()  # type: ignore[no-untyped-call]
