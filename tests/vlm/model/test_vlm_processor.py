"""The processor: from questions, conversations and images to batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vlm import tiny_tokenizer
from transformers import AutoProcessor, pipeline
from vlm_models import picture, tiny_processor, tiny_vlm

from localign.errors import UserError
from localign.vlm import LocalignVLMProcessor
from localign.vlm.data.images import ImageTransform, open_image
from localign.vlm.data.vocabulary import add_special_tokens

K = 4
IMAGE, PAD = 260, 259


def processor(**options: Any) -> LocalignVLMProcessor:
    tokenizer = tiny_tokenizer()
    add_special_tokens(tokenizer)
    return LocalignVLMProcessor(tokenizer, image_size=(16, 16), num_image_tokens=K, **options)


def plain(text: str) -> list[int]:
    tokens: list[int] = tiny_tokenizer()(text, add_special_tokens=False, split_special_tokens=True)[
        "input_ids"
    ]
    return tokens


def test_image_tokens_come_after_bos_and_padding_on_the_left() -> None:
    batch = processor()(text=["Where is it?", "Hi"], images=[picture(1), None])
    first, second = [0, *[IMAGE] * K, *plain("In: Where is it?\nOut:")], [0, *plain("In: Hi\nOut:")]
    padding = len(first) - len(second)
    assert batch["input_ids"].tolist() == [first, [PAD] * padding + second]
    assert batch["attention_mask"].tolist() == [[1] * len(first), [0] * padding + [1] * len(second)]
    assert batch["pixel_values"].dtype == torch.uint8
    assert tuple(batch["pixel_values"].shape) == (1, 3, 16, 16)
    assert "pixel_values" not in processor()(text="Hi")


def test_one_question_with_one_image_and_lists_of_images() -> None:
    one = processor()(text="Hi", images=picture(1))
    for images in ([picture(1)], [[picture(1)]]):
        assert torch.equal(processor()(text=["Hi"], images=images)["pixel_values"], one["pixel_values"])
    none = processor()(text=["Hi", "Ho"], images=[[], [picture(1)]])
    assert (none["input_ids"] == IMAGE).sum(1).tolist() == [0, K]


def test_image_marks_and_special_tokens_in_a_question_are_harmless() -> None:
    batch = processor()(text="a <image> b </s> <PAD>", images=picture(1))
    assert batch["input_ids"].tolist() == [[0, *[IMAGE] * K, *plain("In: a  b </s> <PAD>\nOut:")]]


def test_a_tokenizer_without_bos_puts_the_image_first() -> None:
    tokenizer = tiny_tokenizer(bos=False)
    add_special_tokens(tokenizer)
    ids = LocalignVLMProcessor(tokenizer, (16, 16), K)(text="Hi", images=picture(1))["input_ids"]
    assert ids[0, :K].tolist() == [IMAGE] * K
    assert tokenizer.decode(ids[0, K:]) == "In: Hi\nOut:"


def conversation(*extra: dict[str, Any], image: Any = None) -> list[dict[str, Any]]:
    first = [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]
    return [
        {"role": "user", "content": first if image is not None else "What?"},
        {"role": "assistant", "content": [{"type": "text", "text": "A kite"}]},
        *extra,
    ]


def test_a_conversation_is_in_the_prompt_format() -> None:
    chat = conversation({"role": "user", "content": "Sure?"}, image=picture(1))
    expected = [0, *[IMAGE] * K, *plain("In: What?\nOut:"), *plain("A kite"), 1, *plain("In: Sure?\nOut:")]
    batch = processor().apply_chat_template(chat, tokenize=True, return_dict=True)
    assert batch["input_ids"].tolist() == [expected]
    assert len(batch["pixel_values"]) == 1
    assert processor().apply_chat_template(chat, tokenize=True).tolist() == [expected]
    complete = processor().apply_chat_template(conversation(), tokenize=True)
    assert complete.tolist() == [[0, *plain("In: What?\nOut:"), *plain("A kite"), 1]]


def test_text_of_a_conversation_can_be_given_to_the_processor() -> None:
    chats = [
        conversation({"role": "user", "content": "Sure?"}, image=picture(1)),
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}],
    ]
    texts = processor().apply_chat_template(chats, add_generation_prompt=True)
    assert texts == ["In: What?\nOut:A kite</s>In: Sure?\nOut:", "In: Hi\nOut:"]
    batch = processor()(text=texts, images=[picture(1), picture(2)], return_tensors="pt", padding=True)
    chats[1][0]["content"][0]["image"] = picture(2)
    expected = processor().apply_chat_template(chats, tokenize=True, return_dict=True)
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_images_of_a_conversation_may_be_files(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    expected = processor()(text="Hi", images=picture(1))["pixel_values"]
    path = str(tmp_path / "a.png")
    for part in (
        {"type": "image", "path": path},
        {"type": "image", "url": path},
        {"type": "image_url", "image_url": {"url": path}},
    ):
        chat = [{"role": "user", "content": [part, {"type": "text", "text": "Hi"}]}]
        batch = processor().apply_chat_template(chat, tokenize=True, return_dict=True)
        assert torch.equal(batch["pixel_values"], expected)


def test_naive_stretches() -> None:
    image = picture(1, size=(40, 20))
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC))
    pixels = ImageTransform((16, 16), "naive", (0.5, 0.5, 0.5))(image)
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)


def test_letterbox_pads_with_the_mean_on_both_sides() -> None:
    pixels = ImageTransform((16, 16), "letterbox", (0.48, 0.2, 0.999))(Image.new("RGB", (32, 16), "white"))
    assert pixels[:, 0, 0].tolist() == [122, 51, 254]
    assert (pixels[:, :2] == pixels[:, :1, :1]).all()
    assert pixels[:, 6:10].eq(255).all()
    assert torch.equal(pixels, pixels.flip(1))
    upright = ImageTransform((16, 16), "letterbox", (0.48, 0.2, 0.999))(Image.new("RGB", (16, 32), "white"))
    assert torch.equal(upright, pixels.transpose(1, 2))


def test_crop_keeps_the_centre() -> None:
    image = Image.new("RGB", (48, 16), "red")
    image.paste((0, 0, 255), (16, 0, 32, 16))
    pixels = ImageTransform((16, 16), "crop", (0.5, 0.5, 0.5))(image)
    assert pixels[:, 8, 8].tolist() == [0, 0, 255]
    assert pixels[2, :, 2:14].eq(255).all()


def test_images_are_rgb_and_upright() -> None:
    sideways = picture(1, size=(20, 10))
    exif = sideways.getexif()
    exif[0x0112] = 6
    sideways.info["exif"] = exif.tobytes()
    assert open_image(sideways).size == (10, 20)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_image(clear).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(Image.new("L", (4, 4), 7)).getpixel((0, 0)) == (7, 7, 7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(text=["a", "b"], images=[picture(1)]), "2 questions but 1 images"),
        (
            lambda p: p(text="a", images=[[picture(1), picture(2)]]),
            "conversation 0 has 2 images; at most one is allowed",
        ),
        (lambda p: p(images=picture(1)), "needs a question"),
        (lambda p: p(text="a", images="nowhere.jpg"), "cannot read an image: nowhere.jpg: no such file"),
        (lambda p: p(text="a", images=7), "cannot read an image"),
        (lambda p: p(text="a", return_tensors="np"), "return_tensors"),
        (
            lambda p: p.apply_chat_template([{"role": "system", "content": "a"}]),
            "expected 'user', found 'system'",
        ),
        (lambda p: p.apply_chat_template(conversation()[1:]), "expected 'user', found 'assistant'"),
        (lambda p: p.apply_chat_template(conversation()), "ends with a question"),
        (
            lambda p: p.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}]),
            "text and images, not 'video'",
        ),
        (
            lambda p: p.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}]}], tokenize=True, return_dict=True
            ),
            "cannot read an image",
        ),
        (lambda p: p.apply_chat_template(conversation(), chat_template="x"), "own prompt format"),
    ],
)
def test_bad_input_is_one_line(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call(processor())
    assert "\n" not in str(caught.value)


def test_bad_options_are_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"unknown resize 'naiv'.*did you mean 'naive'"):
        processor(resize="naiv")
    with pytest.raises(UserError, match="unknown prompt format"):
        processor(prompt_format="in-and-out")
    with pytest.raises(UserError, match="lacks <image> or a padding token"):
        LocalignVLMProcessor(tiny_tokenizer())


def test_a_saved_and_loaded_processor_is_the_same(tmp_path: Path) -> None:
    original = processor(prompt_format="vicuna", resize="letterbox", mean=(0.1, 0.2, 0.3))
    original.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is LocalignVLMProcessor
    assert loaded.to_dict() == original.to_dict()
    inputs: dict[str, Any] = {"text": ["Where is it?", "a </s> b"], "images": [picture(1, (30, 10)), None]}
    expected, batch = original(**inputs), loaded(**inputs)
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_transformers_pipeline_answers_questions() -> None:
    model, tokenizer = tiny_vlm()
    own = tiny_processor(model, tokenizer)
    ask: Any = pipeline("image-text-to-text", model=model, processor=own)
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture(1)}, {"type": "text", "text": "What?"}],
        }
    ]
    answer = ask(text=chat, max_new_tokens=4, return_full_text=False)[0]["generated_text"]
    batch = own(text="What?", images=picture(1))
    output = model.generate(**batch, max_new_tokens=4)[0, batch["input_ids"].shape[1] :]
    assert answer == own.decode(output, skip_special_tokens=True)  # type: ignore[no-untyped-call]
