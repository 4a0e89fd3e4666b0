"""Small conversations on disk, shared by several test files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny_vlm import tiny_tokenizer

from localign.vlm.data.examples import ConversationTokenizer
from localign.vlm.data.prompts import prompt_format
from localign.vlm.data.records import Conversations

IMAGE_TOKENS = 5


def turn(role: str, value: Any) -> dict[str, Any]:
    return {"from": role, "value": value}


def record(number: int, *, image: str | None = None, turns: int = 1, words: int = 2) -> dict[str, Any]:
    """A record whose answers repeat its number in ``words`` words."""
    conversation = []
    for i in range(turns):
        mark = "<image>\n" if image and not i else ""
        conversation += [turn("human", f"{mark}question {i}"), turn("gpt", " ".join([f"r{number}"] * words))]
    entry: dict[str, Any] = {"id": f"r{number}", "conversations": conversation}
    return {**entry, "image": image} if image else entry


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_image(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8, 3), value, np.uint8)).save(path)
    return path


def mixed_data(folder: Path, count: int = 12, broken: tuple[int, ...] = ()) -> Conversations:
    """``count`` records of several lengths, every third without image; an image's pixels are its record's number."""
    entries = []
    for number in range(count):
        image = None if number % 3 == 2 else f"images/{number}.png"
        entries.append(record(number, image=image, turns=1 + number % 2, words=1 + number * 5 % 7))
        if image:
            write_image(folder / image, number)
            if number in broken:
                (folder / image).write_bytes(b"no image")
    return Conversations.open([write_json(folder / "data.json", entries)])


def tiny_encoder(max_length: int = 400, **options: Any) -> ConversationTokenizer:
    tokenizer = tiny_tokenizer(pad=True)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return ConversationTokenizer(prompt_format("in-out"), tokenizer, IMAGE_TOKENS, max_length, **options)
