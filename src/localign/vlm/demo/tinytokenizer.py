"""A byte-level BPE tokenizer for a small language model, trained from scratch on a small set of sentences.

A small model's time goes with the number of tokens. Merges therefore cross word borders: a question becomes one
token or a few, and a coordinate becomes one token.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, UNK, PAD = "<s>", "</s>", "<unk>", "<PAD>"

_COORDINATES_AND_DIGITS = r"(?<!\d)[01]\.\d\d?(?!\d)|\p{N}"  # single digits, as in Llama
_SENTENCES = rf"{_COORDINATES_AND_DIGITS}|[^\p{{N}}]+"
# Punctuation takes the space after it, words the space before.
_WORDS = rf"{_COORDINATES_AND_DIGITS}|[^\s\p{{L}}\p{{N}}]+ ?| ?\p{{L}}+|\s"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, across_words: bool = True
) -> PreTrainedTokenizerFast:
    """A lossless byte-level BPE that writes ``<s>`` before a text and can give each coordinate a token of its own.

    Args:
        texts: Texts to learn merges from.
        vocab_size: Most tokens; there are fewer if nothing is left to merge.
        across_words: Whether a token may span several words.
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
