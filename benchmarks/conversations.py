"""A drawn stand-in for the conversations that LLaVA-1.5 was trained on: their turns, lengths and images.

Which parts there are, and how large, is what the authors state. How long the conversations of a part are is
estimated: turns are drawn evenly between two bounds, the length of a turn is an average, and each conversation
is longer or shorter than that by a log-normal factor.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from localign import rng
from localign.vlm.data.prompts import prompt_format
from localign.vlm.demo.tinylm import PROMPT
from localign.vlm.demo.tinytokenizer import train_tokenizer


@dataclass(frozen=True)
class Part:
    """One of the mix's sources; lengths in tokens of Llama-2."""

    thousands: int
    """Conversations."""
    turns: tuple[int, int]
    """Fewest and most questions with answers."""
    question: int
    """Average length of a question."""
    answer: int
    """Average length of an answer."""
    spread: float = 0.3
    """Standard deviation of the logarithm of a conversation's length."""
    image: bool = True


MIX = {
    "LLaVA conversations": Part(58, (3, 6), 12, 32),
    "LLaVA descriptions": Part(23, (1, 1), 14, 130),
    "LLaVA reasoning": Part(77, (1, 1), 22, 150),
    "ShareGPT": Part(40, (1, 8), 60, 300, 0.7, image=False),
    "VQAv2": Part(83, (3, 8), 10, 2),
    "GQA": Part(72, (4, 22), 11, 2),
    "OKVQA": Part(9, (1, 1), 22, 2),
    "OCR-VQA": Part(80, (2, 8), 10, 6),
    "A-OKVQA": Part(66, (1, 1), 45, 2),
    "TextCaps": Part(22, (1, 1), 60, 15, 0.5),
    "RefCOCO": Part(48, (1, 9), 22, 20),
    "Visual Genome": Part(86, (8, 10), 26, 16),
}
IMAGE_TOKENS, MAX_LENGTH = 576, 2048
"""Of an image, and of the longest conversation with its image, in the training of the 7B model."""

WRAPPING = 6
"""Tokens around a question and its answer: In, colon, newline, Out, colon, end of sequence."""
SHORTEST_TURN = 12
"""Tokens with their wrapping; where the scale leaves a turn less, a conversation has fewer turns."""
WORDS = (
    "a", "all", "and", "are", "at", "back", "been", "big", "blue", "by", "can", "car", "cat", "day",
    "dog", "down", "each", "find", "first", "food", "for", "from", "green", "had", "has", "have", "her",
    "his", "house", "how", "in", "is", "it", "just", "large", "like", "long", "look", "made", "make",
    "man", "many", "may", "more", "most", "of", "on", "one", "or", "out", "people", "red", "side",
    "small", "street", "table", "that", "the", "there", "they", "this", "time", "to", "tree", "two",
    "water", "what", "white", "who", "with", "woman",
)  # fmt: skip
PICTURES = 8
"""Different images."""


class Drawn(NamedTuple):
    """One conversation before it has words."""

    image: bool
    turns: list[tuple[int, int]]
    """Tokens of each question and answer, without the wrapping."""


def drawn_conversations(with_image: int, text_only: int, scale: float, seed: int) -> list[Drawn]:
    """Conversations of the mix's lengths, each part with its share.

    Args:
        with_image: How many have an image.
        text_only: How many have none.
        scale: Of text lengths; 1 is that of the mix.
        seed: Of turns and lengths.
    """
    draw = rng.generator(seed, "bench conversations")
    drawn = []
    for image, count in ((True, with_image), (False, text_only)):
        parts = [part for part in MIX.values() if part.image == image]
        counts = _shares([part.thousands for part in parts], count)
        drawn += [_drawn(part, scale, draw) for part, n in zip(parts, counts, strict=True) for _ in range(n)]
    return [drawn[i] for i in draw.permutation(len(drawn))]


def _shares(weights: Sequence[int], count: int) -> list[int]:
    """Whole numbers in the proportion of the weights, whose sum is ``count``."""
    borders = np.rint(np.cumsum([0, *weights]) * count / sum(weights)).astype(int)
    return np.diff(borders).tolist()


def _drawn(part: Part, scale: float, draw: np.random.Generator) -> Drawn:
    turns = int(draw.integers(part.turns[0], part.turns[1] + 1))
    factor = float(np.exp(part.spread * draw.standard_normal() - part.spread**2 / 2))
    words = turns * (part.question + part.answer) * factor
    total = scale * (words + turns * WRAPPING)
    turns = max(1, min(turns, int(total / SHORTEST_TURN)))
    each = total / turns - WRAPPING
    answer = max(1, round(each * part.answer / (part.question + part.answer)))
    return Drawn(part.image, [(max(1, round(each - answer)), answer)] * turns)


def drawn_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer to which each of :data:`WORDS` is one token."""
    prompt = prompt_format(PROMPT)
    texts = [" ".join(WORDS), " " + " ".join(WORDS), *WORDS, prompt.text(train_tokenizer((), 0), "a")]
    return train_tokenizer(texts, 1022, across_words=False)


def write_conversations(drawn: Sequence[Drawn], folder: Path, image_size: tuple[int, int], seed: int) -> Path:
    """The conversations in random words, a LLaVA-format file with its images beside it.

    Args:
        drawn: What to write.
        folder: Where to.
        image_size: Width and height of the images, pixels.
        seed: Of words and images.

    Returns:
        The JSON file.
    """
    for i in range(PICTURES):
        picture(image_size, seed, i).save(folder / f"{i}.jpg", quality=90)
    records = []
    for i, conversation in enumerate(drawn):
        draw = rng.generator(seed, "bench words", i)
        values = [_words(n, draw) for turn in conversation.turns for n in turn]
        turns = [{"from": ("human", "gpt")[k % 2], "value": value} for k, value in enumerate(values)]
        image = {"image": f"{i % PICTURES}.jpg"} if conversation.image else {}
        records.append({"id": str(i), **image, "conversations": turns})
    path = folder / "conversations.json"
    path.write_text(json.dumps(records))
    return path


def _words(count: int, draw: np.random.Generator) -> str:
    return " ".join(WORDS[i] for i in draw.integers(len(WORDS), size=count))


def picture(size: tuple[int, int], seed: int, index: int) -> Image.Image:
    """An image of smooth colours, ``size`` being width and height."""
    draw = rng.generator(seed, "bench pictures", index)
    knots = torch.from_numpy(draw.random((1, 3, 6, 8), dtype=np.float32))
    colours = F.interpolate(knots, size=size[::-1], mode="bicubic")[0].clamp(0, 1)
    pixels: NDArray[np.uint8] = (colours * 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels)
