"""Synthetic conversations with the turns, lengths and images of LLaVA-1.5's training mixture.

The parts of the mixture and their sizes are published. The lengths are estimates: the number of turns is uniform
between two bounds, turns have an average length, and a log-normal factor scales each conversation.
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
    """One source of the mixture; lengths are Llama-2 tokens."""

    thousands: int
    """Thousands of conversations."""
    turns: tuple[int, int]
    """Minimum and maximum number of question-answer pairs."""
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
"""Tokens per image, and the maximum length of a conversation with its image, in the training of the 7B model."""

WRAPPING = 6
"""Tokens around a question and its answer: In, colon, newline, Out, colon, end of sequence."""
SHORTEST_TURN = 12
"""Minimum tokens of a turn with its wrapping; a short conversation gets fewer turns instead of shorter turns."""
WORDS = (
    "a", "all", "and", "are", "at", "back", "been", "big", "blue", "by", "can", "car", "cat", "day",
    "dog", "down", "each", "find", "first", "food", "for", "from", "green", "had", "has", "have", "her",
    "his", "house", "how", "in", "is", "it", "just", "large", "like", "long", "look", "made", "make",
    "man", "many", "may", "more", "most", "of", "on", "one", "or", "out", "people", "red", "side",
    "small", "street", "table", "that", "the", "there", "they", "this", "time", "to", "tree", "two",
    "water", "what", "white", "who", "with", "woman",
)  # fmt: skip
PICTURES = 8
"""Number of different images."""


class Drawn(NamedTuple):
    """The lengths of one conversation."""

    image: bool
    turns: list[tuple[int, int]]
    """Tokens of each question and answer, without the wrapping."""


def drawn_conversations(with_image: int, text_only: int, scale: float, seed: int) -> list[Drawn]:
    """Draw conversation lengths, with each part's share of the mixture.

    Args:
        with_image: Number of conversations with an image.
        text_only: Number of conversations without an image.
        scale: Factor on text lengths; 1 gives the lengths of the mixture.
        seed: Seed of the turns and lengths.
    """
    draw = rng.generator(seed, "bench conversations")
    drawn = []
    for image, count in ((True, with_image), (False, text_only)):
        parts = [part for part in MIX.values() if part.image == image]
        counts = _shares([part.thousands for part in parts], count)
        drawn += [
            _draw_lengths(part, scale, draw) for part, n in zip(parts, counts, strict=True) for _ in range(n)
        ]
    return [drawn[i] for i in draw.permutation(len(drawn))]


def _shares(weights: Sequence[int], count: int) -> list[int]:
    """Split ``count`` into whole numbers in proportion to the weights."""
    borders = np.rint(np.cumsum([0, *weights]) * count / sum(weights)).astype(int)
    return [int(share) for share in np.diff(borders)]


def _draw_lengths(part: Part, scale: float, draw: np.random.Generator) -> Drawn:
    turns = int(draw.integers(part.turns[0], part.turns[1] + 1))
    factor = float(np.exp(part.spread * draw.standard_normal() - part.spread**2 / 2))
    words = turns * (part.question + part.answer) * factor
    total = scale * (words + turns * WRAPPING)
    turns = max(1, min(turns, int(total / SHORTEST_TURN)))
    each = total / turns - WRAPPING
    answer = max(1, round(each * part.answer / (part.question + part.answer)))
    return Drawn(part.image, [(max(1, round(each - answer)), answer)] * turns)


def drawn_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer with one token for each of :data:`WORDS`."""
    prompt = prompt_format(PROMPT)
    texts = [" ".join(WORDS), " " + " ".join(WORDS), *WORDS, prompt.text(train_tokenizer((), 0), "a")]
    return train_tokenizer(texts, 1022, across_words=False)


def write_conversations(drawn: Sequence[Drawn], folder: Path, image_size: tuple[int, int], seed: int) -> Path:
    """Write conversations of random words as a JSON file in LLaVA's format, and their images.

    Args:
        drawn: The lengths of the conversations.
        folder: The output folder.
        image_size: Width and height of the images, pixels.
        seed: Seed of the words and images.

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
    """An image of smooth colours; ``size`` is (width, height)."""
    draw = rng.generator(seed, "bench pictures", index)
    knots = torch.from_numpy(draw.random((1, 3, 6, 8), dtype=np.float32))
    colours = F.interpolate(knots, size=size[::-1], mode="bicubic")[0].clamp(0, 1)
    pixels: NDArray[np.uint8] = (colours * 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels)
