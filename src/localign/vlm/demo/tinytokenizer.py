"""A byte-level BPE for a small language model, trained from scratch on the few sentences that it is to know.

What a small model spends its time on are tokens. So merges go across words, as far as the vocabulary lasts: the
sentences of a question, with what they ask about, are then one token or a few, and a coordinate is one token.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, UNK, PAD = "<s>", "</s>", "<unk>", "<PAD>"

_COORDINATES_AND_DIGITS = r"(?<!\d)[01]\.\d\d?(?!\d)|\p{N}"  # digits by themselves, as in Llama
_SENTENCES = rf"{_COORDINATES_AND_DIGITS}|[^\p{{N}}]+"
# Marks keep the space that follows them, words the one before.
_WORDS = rf"{_COORDINATES_AND_DIGITS}|[^\s\p{{L}}\p{{N}}]+ ?| ?\p{{L}}+|\s"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, across_words: bool = True
) -> PreTrainedTokenizerFast:
    """A byte-level BPE: it writes ``<s>`` before a text, gives every coordinate a token and loses nothing.

    Args:
        texts: What merges are learned from.
        vocab_size: Most tokens; fewer where there is nothing left to merge.
        across_words: Whether one token may hold several words.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SENTENCES if across_words else _WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, UNK, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
