"""Exports of native resolution answer in processes without localign, and as servers such as vLLM ask them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from native_models import MOST, SHAPES, naflex_backbone, native_vlm, pictures
from test_portable_vlm import ELSEWHERE, loaded
from tiny_vlm import tiny_backbone
from vlm_models import KINDS, aligned_source, picture, tiny_processor

from localign.backbones.native import native_grid
from localign.portable.modeling_localign_vlm import LocalignVLMModel
from localign.portable.processing_localign_vlm import LocalignProcessor
from localign.vlm import LocalignVLM
from localign.vlm.model.build import load_vlm, save_vlm
from localign.vlm.model.presets import VisionSource


def theirs_of(model: LocalignVLM, tokenizer: Any) -> LocalignProcessor:
    own = tiny_processor(model, tokenizer)
    return LocalignProcessor(
        tokenizer,
        own.image_size,
        own.num_image_tokens,
        interpolation=own.interpolation,
        max_patches=own.max_patches,
        patch_size=own.patch_size,
    )


def assert_same(model: LocalignVLM, tokenizer: Any, folder: Path) -> None:
    """The portable model gives the model's own logits for images of several shapes, one, and none."""
    save_vlm(model, tiny_processor(model, tokenizer), folder)
    twin = loaded(folder)
    questions = [f"What is {number}{'?' * number}" for number in range(len(SHAPES))]
    texts = [f"<image>In: {question}\nOut:" for question in questions]
    processor = theirs_of(model, tokenizer)
    for count in (1, len(SHAPES)):
        ours = tiny_processor(model, tokenizer)(text=questions[:count], images=pictures()[:count])
        options: Any = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        theirs = processor(text=texts[:count], images=pictures()[:count], **options)
        assert torch.equal(theirs["input_ids"], ours["input_ids"])
        assert torch.equal(theirs["image_grids"], ours["image_grids"])
        assert theirs["pixel_values"].shape[1] == MOST
        with torch.no_grad():
            expected = model(**ours).logits
            assert torch.equal(twin(**ours).logits, expected)
            inputs = {name: theirs[name] for name in ours}
            assert torch.equal(twin(**inputs).logits, expected), "padded to the budget"
    text = {"input_ids": torch.arange(3, 9)[None]}
    with torch.no_grad():
        assert torch.equal(twin(**text).logits, model(**text).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_gives_the_same_logits(kind: str, tmp_path: Path) -> None:
    assert_same(*native_vlm(kind), tmp_path)


@pytest.mark.parametrize("tower", ["naflex", "aliased", "no prefix", "soft-cap"])
def test_towers_of_every_kind(tower: str, tmp_path: Path) -> None:
    if tower == "soft-cap":
        sources = [aligned_source()]
        assert sources[0].backbone.soft_cap == 1.0
    else:
        backbone = naflex_backbone() if tower == "naflex" else tiny_backbone(prefix=tower != "no prefix")
        if tower == "aliased":
            backbone.position_interpolation = "bicubic-aliased"
        sources = [VisionSource(backbone)]
    model, tokenizer = native_vlm("transformer", sources)
    assert_same(model, tokenizer, tmp_path)
    again, _ = load_vlm(tmp_path)
    again.eval()  # type: ignore[no-untyped-call]
    batch = tiny_processor(model, tokenizer)(text=["?"] * len(SHAPES), images=pictures())
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.slow
def test_a_process_without_localign_gives_the_same_answers(tmp_path: Path) -> None:
    image = picture(3, (50, 14))
    image.save(tmp_path / "image.png")
    model, tokenizer = native_vlm("decoder")
    processor = tiny_processor(model, tokenizer)
    folder = save_vlm(model, processor, tmp_path / "model")
    generator: Any = model
    batch = processor(text="What is it?", images=image)
    ids = generator.generate(**batch, max_new_tokens=8, do_sample=False)
    answer = processor.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)  # type: ignore[no-untyped-call]
    result = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        input=json.dumps([str(tmp_path / "image.png"), [str(folder)]]),
        capture_output=True,
        text=True,
        env={"PATH": "", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert [json.loads(line) for line in result.stdout.splitlines()] == [ids.tolist(), answer]


def test_servers_are_told_the_tokens_of_every_size(tmp_path: Path) -> None:
    """What vLLM's transformers back-end asks for."""
    model, tokenizer = native_vlm("transformer")
    processor = theirs_of(model, tokenizer)
    sizes = [(height, width) for width, height in SHAPES]
    grids = [native_grid(height, width, (8, 8), MOST) for height, width in sizes]
    tokens = [1 + rows * columns for rows, columns in grids]
    said = processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert said == {"num_image_tokens": tokens, "num_image_patches": [1] * len(SHAPES)}
    size = processor.image_processor.size
    most = processor._get_num_multimodal_tokens(image_sizes=[(size["height"], size["width"])])
    assert most["num_image_tokens"] == [1 + MOST], "the size with the most tokens"

    save_vlm(model, tiny_processor(model, tokenizer), tmp_path)
    base: Any = LocalignVLMModel.from_pretrained(tmp_path).eval()  # type: ignore[no-untyped-call]
    batch = processor.image_processor(pictures())
    features = base.get_image_features(**batch, return_dict=True).pooler_output
    assert [len(found) for found in features] == tokens
    alone = [
        base.get_image_features(**processor.image_processor(image)).pooler_output for image in pictures()
    ]
    for found, (expected,) in zip(features, alone, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_images_and_grids_go_together(tmp_path: Path) -> None:
    model, tokenizer = native_vlm()
    save_vlm(model, tiny_processor(model, tokenizer), tmp_path)
    twin = loaded(tmp_path)
    batch = tiny_processor(model, tokenizer)(text=["?"], images=[picture(1)])
    with pytest.raises(ValueError, match="image_grids go with models of native resolution"):
        twin(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"])
    with pytest.raises(ValueError, match="1 images need 6 image tokens, but the text has 5"):
        twin(input_ids=batch["input_ids"][:, 2:], **{n: batch[n] for n in ("pixel_values", "image_grids")})
