"""A small Llama and a byte-level BPE tokenizer, trained from scratch on the text of conversations.

The demo's vision-language models start from it as full-sized ones start from Llama-2: it knows the language of the
questions and has seen no images. Its export is a transformers folder, like any other language model's.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from localign import rng
from localign.data.stream import SampleStream
from localign.engine import BatchPlan, Outcome, StepResult, Task, TrainConfig, train
from localign.engine.batch import to_device
from localign.engine.distributed import DistributedContext
from localign.errors import UserError
from localign.files import replacing_folder
from localign.vlm.data.prompts import IGNORE_INDEX, prompt_format
from localign.vlm.data.records import open_files, read_records
from localign.vlm.demo.tinytokenizer import train_tokenizer

PROMPT = "in-out"
_VAL_BATCH = 64

Turns = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class TinyLMConfig(TrainConfig):
    """Train a small language model and its tokenizer on the text of conversations."""

    out: str = "runs/tinylm"
    """Run folder; its export is a transformers folder."""
    data: str = ""
    """LLaVA-format file of conversations, JSON or JSON lines; images are ignored."""
    val: str | None = None
    """Validation file in the same format; default none."""
    vocab_size: int = 1024
    """Most tokens in the vocabulary, at least 260: bytes, four special tokens, and merges."""
    layers: int = 4
    """Transformer blocks."""
    width: int = 192
    """Hidden width, channels."""
    heads: int = 4
    """Attention heads."""
    mlp_width: int = 512
    """Hidden width of the MLPs, channels."""
    steps: int | None = 300
    """Optimizer steps."""
    batch_size: int = 32
    """Conversations per optimizer step."""
    lr: float | None = 3e-3
    """Peak learning rate."""
    warmup_steps: int = 30
    """Steps of linear warm-up."""
    workers: int = 0
    """Must be 0: there are no images to load."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise UserError("no conversations: give --data, a LLaVA-format file")
        if self.vocab_size < 260:
            raise UserError(f"--vocab-size must be at least 260, not {self.vocab_size}")
        for name in ("layers", "width", "heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.width % (2 * self.heads):
            raise UserError(f"--width {self.width} does not divide into {self.heads} heads of even width")
        if self.workers:
            raise UserError("--workers has no effect without images; leave it at 0")


def train_tiny_lm(config: TinyLMConfig) -> Outcome:
    """Train tokenizer and model; transformers loads them from ``outcome.folder / "export"``.

    Raises:
        UserError: Options or data are bad.
        RunFailure: Training does not recover from non-finite losses.
    """
    return train(TinyLMTask(config), config, "vlm tinylm")


class TextBatch(NamedTuple):
    """Conversations in the order of their positions."""

    input_ids: Tensor
    """int64 ``(batch, tokens)``, padded on the right."""
    lengths: Tensor
    """int64 ``(batch,)``, tokens without padding."""
    positions: Tensor
    """int64 ``(batch,)``, global positions in the stream."""
    indices: Tensor
    """int64 ``(batch,)``, indices of the conversations."""
    bad: tuple[tuple[str, str], ...] = ()


class TinyLMTask(Task):
    """Next-token cross-entropy over questions and answers.

    Args:
        config: Data and sizes.

    Raises:
        UserError: The data is missing or holds no conversations.
    """

    def __init__(self, config: TinyLMConfig) -> None:
        self.config = config
        self.seed = config.seed
        self.device = torch.device("cpu")
        conversations = read_turns(config.data)
        self.tokenizer = train_tokenizer(_texts(conversations), config.vocab_size)
        self.ids = self._tokenise(conversations)
        self.val_ids = self._tokenise(read_turns(config.val)) if config.val else []
        with rng.seeded_globals(config.seed, "tiny language model"):
            self.model = LlamaForCausalLM(self._architecture())

    def _architecture(self) -> LlamaConfig:
        config, tokenizer = self.config, self.tokenizer
        return LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    def _tokenise(self, conversations: Sequence[Turns]) -> list[Tensor]:
        prompt = prompt_format(PROMPT)
        return [torch.tensor(encoded.ids) for encoded in prompt.conversations(self.tokenizer, conversations)]

    @property
    def module(self) -> LlamaForCausalLM:
        return self.model

    def samples(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> dict[str, str]:
        digest = rng.key(0, "tiny language model", *torch.cat(self.ids).tolist())
        return {"data": f"{digest:016x}"}

    def batches(self, plan: BatchPlan) -> Iterator[TextBatch]:
        stream = SampleStream(plan.seed, len(self.ids))
        for positions in plan.micro_batches():
            indices = torch.from_numpy(stream.indices(positions.start, positions.stop))
            yield self._batch([self.ids[i] for i in indices.tolist()], torch.tensor(positions), indices)

    def _batch(self, ids: list[Tensor], positions: Tensor, indices: Tensor) -> TextBatch:
        padded = pad_sequence(ids, batch_first=True, padding_value=int(self.tokenizer.pad_token_id))
        lengths = torch.tensor([len(i) for i in ids])
        return TextBatch(padded, lengths, positions, indices)

    def step(self, model: nn.Module, batch: TextBatch) -> StepResult:
        loss, count = self._loss(model, batch)
        return StepResult(loss, count)

    def _loss(self, model: nn.Module, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """The summed loss and the number of predicted tokens."""
        ids = batch.input_ids
        # No attention mask: padding comes last and attention is causal.
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        predicted = torch.arange(1, ids.shape[1], device=ids.device) < batch.lengths[:, None]
        targets = ids[:, 1:].masked_fill(~predicted, IGNORE_INDEX)
        loss = F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        return loss, predicted.sum().float()

    def throughput(self, batch: TextBatch) -> dict[str, int]:
        return {"tokens": int(batch.lengths.sum())}

    @torch.no_grad()
    def validate(self, module: nn.Module, context: DistributedContext) -> dict[str, float]:
        """Cross-entropy per token on the validation conversations."""
        if not self.val_ids:
            return {}
        sums = torch.zeros(2)
        for begin in range(0, len(self.val_ids), _VAL_BATCH):
            ids = self.val_ids[begin : begin + _VAL_BATCH]
            indices = torch.arange(begin, begin + len(ids))
            batch = to_device(self._batch(ids, indices, indices), self.device)
            sums += torch.stack(self._loss(module, batch)).cpu()
        return {"val_loss": float(sums[0] / sums[1])}

    def set_grad_checkpointing(self) -> None:
        self.model.gradient_checkpointing_enable()

    def summary(self) -> dict[str, Any]:
        parameters = sum(p.numel() for p in self.model.parameters())
        return {"parameters": parameters, "vocabulary": len(self.tokenizer)}

    def export(self, module: nn.Module, folder: Path, provenance: dict[str, Any]) -> None:
        """Write model and tokenizer in transformers' format, and ``provenance.json``."""
        assert isinstance(module, LlamaForCausalLM)
        with replacing_folder(folder) as temporary:
            module.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
            (temporary / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")


def _texts(conversations: Sequence[Turns]) -> Iterator[str]:
    """Questions in the prompt format, and answers."""
    prompt, untrained = prompt_format(PROMPT), train_tokenizer((), 0)
    for turns in conversations:
        for question, answer in turns:
            yield prompt.text(untrained, question)
            yield answer


def read_turns(path: str | Path) -> list[Turns]:
    """The (question, answer) pairs of every conversation in a LLaVA-format file.

    Raises:
        UserError: The file is missing, empty or in another format.
    """
    conversations = [
        parsed.record.turns for file in open_files([path], []) for parsed, _ in read_records(file)
    ]
    if not conversations:
        raise UserError(f"{path} holds no conversation")
    return conversations
