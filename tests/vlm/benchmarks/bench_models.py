"""Models that answer benchmark questions: scripted ones, and tiny exports of localign and transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_files import WRITERS

from localign.engine.distributed import DistributedContext
from localign.errors import UserError
from localign.vlm.benchmarks.table import benchmark
from localign.vlm.scoring.base import Benchmark, QuestionSet
from localign.vlm.scoring.boxes import ORIGINAL, BoxFrame
from localign.vlm.scoring.questions import Question

CPU = torch.device("cpu")
ALONE = DistributedContext(0, 1, 0, CPU)


class Killed(Exception):
    """Simulates the end of the process."""


@dataclass
class ScriptedModel:
    """Answers are hashes of the questions, so that different questions get different answers."""

    weights: str = "one"
    words: str = "Q: {} A:"
    frame: BoxFrame | None = ORIGINAL
    patience: int | None = None
    """Batches before the simulated end; None for no end."""
    asked: list[str] = field(default_factory=list)
    """Ids of the questions so far, in order."""

    @property
    def identity(self) -> dict[str, str]:
        return {"weights": self.weights}

    def prompt(self, message: str) -> str:
        return self.words.format(message)

    def check_choices(self, choices: Sequence[str]) -> None:
        if any(len(choice) > 5 for choice in choices):
            raise UserError("too long")

    def answer_texts(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        return [self._words(question) for question in self._record(questions)]

    def choice_probabilities(self, questions: Sequence[Question]) -> list[list[float]]:
        return [self._numbers(q, len(q.choices)) for q in self._record(questions)]

    def _record(self, questions: Sequence[Question]) -> Sequence[Question]:
        if self.patience is not None:
            self.patience -= 1
            if self.patience < 0:
                raise Killed
        assert len({(question.mode, question.choices) for question in questions}) == 1
        self.asked += [question.id for question in questions]
        return questions

    def _words(self, question: Question) -> str:
        if "box" not in question.payload:
            return ["yes", "2", "t-shirt", ""][int(4 * self._numbers(question, 1)[0])]
        x, y, w, h = self._numbers(question, 4)
        return f"[{x / 2:.3f}, {y / 2:.3f}, {x / 2 + w / 2:.3f}, {y / 2 + h / 2:.3f}]"

    def _numbers(self, question: Question, count: int) -> list[float]:
        text = self.weights + self.prompt(question.message) + question.id
        return [(byte + 0.5) / 256 for byte in hashlib.sha256(text.encode()).digest()[:count]]


def suites(root: Path, *names: str, limit: int | None = None) -> list[tuple[Benchmark, QuestionSet]]:
    """Write and read miniatures of benchmarks."""
    found = []
    for name in names:
        suite = benchmark(name)
        found.append((suite, suite.read(WRITERS[name](root), limit=limit, allow_partial=True)))
    return found


def save_tiny_vlm(folder: Path, seed: int = 0, words: Sequence[str] = (), **options: Any) -> Path:
    """Save a random model as ``localign vlm export`` does; each of the ``words`` is a single token."""
    from vlm_models import tiny_processor, tiny_vlm

    from localign.vlm.model.build import save_vlm

    model, tokenizer = tiny_vlm(seed=seed, words=words, max_position_embeddings=2048)
    for name, value in options.items():
        setattr(model.config, name, value)
    return save_vlm(model, tiny_processor(model, tokenizer), folder)


def save_tiny_llava(folder: Path, before_answers: str = "") -> Path:
    """Save a random LLaVA of transformers, with processor and chat template.

    Args:
        folder: Folder of the model.
        before_answers: Text of the template between "ASSISTANT:" and an answer.
    """
    from tiny_vlm import tiny_tokenizer
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = tiny_tokenizer(pad=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image = tokenizer.convert_tokens_to_ids("<image>")
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    tokens: dict[str, Any] = {"image_token_index": image, "image_token_id": image}
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **tokens))
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16}
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "{% for m in messages %}{{ m.role | upper }}:{% if m.role == 'assistant' %}"
            + before_answers
            + "{% endif %}{% for p in m.content %}{% if p.type == 'image' %}<image>\n{% else %}{{ p.text }}"
            "{% endif %}{% endfor %} {% endfor %}"
            "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
        ),
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_tiny_idefics(folder: Path) -> Path:
    """Save a random Idefics3 of transformers. Like SmolVLM, it cuts an image into tiles according to its shape.

    Args:
        folder: Folder of the model.
    """
    from tiny_vlm import tiny_tokenizer
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
    )

    tokenizer = tiny_tokenizer(pad=True)
    marks = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    torch.manual_seed(0)
    tokens: dict[str, Any] = {
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = Idefics3ForConditionalGeneration(
        Idefics3Config(
            **tokens,
            scale_factor=2,
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
                "initializer_range": 0.3,
            },
            text_config={
                "model_type": "llama",
                "vocab_size": len(tokenizer),
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "initializer_range": 0.3,
                "pad_token_id": tokenizer.pad_token_id,
                "bos_token_id": 0,
                "eos_token_id": 1,
            },
        )
    )
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessor(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=(
            "{% for m in messages %}{{ m.role | capitalize }}:{% for p in m.content %}"
            "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}<end_of_utterance>\n"
            "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
        ),
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
