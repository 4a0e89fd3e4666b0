"""Token ids and labels of records, and truncation at the limit."""

from __future__ import annotations

import pytest
from tiny_vlm import tiny_tokenizer
from vlm_data import IMAGE_TOKENS, tiny_encoder

from localign.errors import UserError
from localign.vlm.data.dialects import Record
from localign.vlm.data.examples import ConversationTokenizer, Example, NothingToLearn, encode
from localign.vlm.data.prompts import IGNORE_INDEX, prompt_format

TURNS = (("<image>\nWhat?", "Kite"), ("Where?", "Left"))
WITH_IMAGE, TEXT_ONLY = Record("a", "a.png", TURNS), Record("b", None, TURNS)


def labelled(encoder: ConversationTokenizer, example: Example) -> str:
    return str(encoder.tokenizer.decode(example.labels[example.labels != IGNORE_INDEX]))


def test_image_tokens_come_after_the_beginning() -> None:
    encoder = tiny_encoder()
    example = encoder(WITH_IMAGE)
    text = encoder.tokenizer.decode(example.input_ids)
    assert text == "<s>" + "<image>" * IMAGE_TOKENS + "In: What?\nOut:Kite</s>In: Where?\nOut:Left</s>"
    assert labelled(encoder, example) == "Kite</s>Left</s>"
    learned = example.labels != IGNORE_INDEX
    assert example.labels[learned].equal(example.input_ids[learned])
    assert example.labels[0] == IGNORE_INDEX


def test_text_only_records_have_no_image_tokens() -> None:
    encoder = tiny_encoder()
    example = encoder(TEXT_ONLY)
    assert encoder.tokenizer.decode(example.input_ids) == "<s>In: What?\nOut:Kite</s>In: Where?\nOut:Left</s>"
    assert len(encoder(WITH_IMAGE).input_ids) == len(example.input_ids) + IMAGE_TOKENS


def test_the_limit_counts_image_tokens() -> None:
    whole = tiny_encoder()(WITH_IMAGE)
    for limit in (24, 30, 40):
        cut = tiny_encoder(max_length=limit)(WITH_IMAGE)
        assert len(cut.input_ids) == limit
        assert cut.input_ids.equal(whole.input_ids[:limit])
        assert cut.labels.equal(whole.labels[:limit])


def test_the_published_limit_counts_text_only() -> None:
    encoder = tiny_encoder(max_length=24, text_limit=True)
    assert len(encoder(WITH_IMAGE).input_ids) == 24 + IMAGE_TOKENS == encoder.limit(True)
    assert len(encoder(TEXT_ONLY).input_ids) == 24 == encoder.limit(False)


def test_a_record_truncated_before_its_first_answer_is_an_error() -> None:
    start = len("_In: What?\nOut:")
    with pytest.raises(NothingToLearn, match=f"no answer begins within {IMAGE_TOKENS + start} tokens"):
        tiny_encoder(max_length=IMAGE_TOKENS + start)(WITH_IMAGE)
    encoder = tiny_encoder(max_length=IMAGE_TOKENS + start + 1)
    assert labelled(encoder, encoder(WITH_IMAGE)) == "K"


def test_limits_without_room_and_tokenizers_without_an_image_token() -> None:
    with pytest.raises(UserError, match="a limit of 8 tokens leaves no room for text: an image takes 5"):
        tiny_encoder(max_length=8)
    with pytest.raises(UserError, match="the tokenizer has no image token <image>"):
        ConversationTokenizer(prompt_format("in-out"), tiny_tokenizer(), IMAGE_TOKENS, 100)
    with pytest.raises(UserError, match="no image token"):
        encode(
            WITH_IMAGE,
            prompt_format("in-out"),
            tiny_tokenizer(),
            num_image_tokens=IMAGE_TOKENS,
            max_length=99,
        )
