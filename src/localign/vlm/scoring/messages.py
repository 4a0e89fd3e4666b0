"""The published wording of questions, without the words that a prompt format puts around it."""

from __future__ import annotations

from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

SHORT = "Answer the question using a single word or phrase."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
LETTER = "Answer with the option's letter from the given choices directly."


def short_answer(question: str) -> str:
    """Ask for a word or phrase (VQAv2, GQA, TextVQA, POPE)."""
    return f"{question}\n{SHORT}"


def short_answer_or_none(question: str) -> str:
    """Ask for a word or phrase, or for the word "Unanswerable" (VizWiz)."""
    return f"{question}\n{UNANSWERABLE}\n{SHORT}"


def true_or_false(statement: str) -> str:
    """Ask whether a statement is true (VSR)."""
    return (
        f'Based on the image, is this statement "True" or "False"? {statement}\n'
        'Respond with "True" or "False" directly.'
    )


def letter_of_choice(question: str, choices: Sequence[str]) -> str:
    """Ask for the letter of one of at most 26 choices (TallyQA, AI2D)."""
    listed = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([question, *listed, LETTER])


def box_of(sentence: str) -> str:
    """Ask for the box of the region that a sentence describes (RefCOCO, OCID-Ref)."""
    return f'Please provide the bounding box coordinate of the region this sentence describes: "{sentence}"'
