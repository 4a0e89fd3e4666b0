"""Normalisation of answers in words: the published normalisers, a symmetric one, and the soft score of VQA.

The three published evaluators apply the same steps, but not to both sides. A right answer can therefore count as
wrong: VQAv2 rewrites the prediction "two" to "2", but leaves an annotator's "two" as it is. ``strict`` treats both
sides alike.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Normaliser = Callable[[str], str]

ARTICLES = frozenset(("a", "an", "the"))

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_ANY_MARK = re.compile('[.;/\\[\\]"{}()=+\\\\_\\-><@`,?!]')
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MAX_FULL_STOPS = 32
"""The published code passes a flag with value 32 as the maximum number of replacements."""


_SPELLINGS = """
    aint ain't arent aren't cant can't couldve could've couldnt couldn't couldn'tve couldn't've
    couldnt've couldn't've didnt didn't doesnt doesn't dont don't hadnt hadn't hadnt've hadn't've
    hadn'tve hadn't've hasnt hasn't havent haven't hed he'd hed've he'd've he'dve he'd've hes he's
    howd how'd howll how'll hows how's Id've I'd've I'dve I'd've Im I'm Ive I've isnt isn't itd it'd
    itd've it'd've it'dve it'd've itll it'll let's let's maam ma'am mightnt mightn't
    mightnt've mightn't've mightn'tve mightn't've mightve might've mustnt mustn't mustve must've
    neednt needn't notve not've oclock o'clock oughtnt oughtn't ow's'at 'ow's'at 'ows'at 'ow's'at
    'ow'sat 'ow's'at shant shan't shed've she'd've she'dve she'd've she's she's shouldve should've
    shouldnt shouldn't shouldnt've shouldn't've shouldn'tve shouldn't've somebody'd somebodyd
    somebodyd've somebody'd've somebody'dve somebody'd've somebodyll somebody'll somebodys somebody's
    someoned someone'd someoned've someone'd've someone'dve someone'd've someonell someone'll
    someones someone's somethingd something'd somethingd've something'd've something'dve something'd've
    somethingll something'll thats that's thered there'd thered've there'd've there'dve there'd've
    therere there're theres there's theyd they'd theyd've they'd've they'dve they'd've theyll they'll
    theyre they're theyve they've twas 'twas wasnt wasn't wed've we'd've we'dve we'd've weve we've
    werent weren't whatll what'll whatre what're whats what's whatve what've whens when's
    whered where'd wheres where's whereve where've whod who'd whod've who'd've who'dve who'd've
    wholl who'll whos who's whove who've whyll why'll whyre why're whys why's wont won't
    wouldve would've wouldnt wouldn't wouldnt've wouldn't've wouldn'tve wouldn't've yall y'all
    yall'll y'all'll y'allll y'all'll yall'd've y'all'd've y'alld've y'all'd've y'all'dve y'all'd've
    youd you'd youd've you'd've you'dve you'd've youll you'll youre you're youve you've
"""

CONTRACTIONS = dict(zip(_SPELLINGS.split()[::2], _SPELLINGS.split()[1::2], strict=True))
"""VQAv2 and TextVQA: a word to the same word with its apostrophes, with few exceptions."""

_APOSTROPHES_IN_VIZWIZ = frozenset(("aint", "arent", "cant", "couldve", "couldnt", "weve", "wheres", "whove"))
_KEYS_WITH_APOSTROPHES_IN_VIZWIZ = frozenset(("couldn'tve", "hadn'tve"))


def _with_backticks(key: str, value: str) -> tuple[str, str]:
    if key in _APOSTROPHES_IN_VIZWIZ:
        return key, value
    new_key = key if key in _KEYS_WITH_APOSTROPHES_IN_VIZWIZ else key.replace("'", "`")
    return new_key, value.replace("'", "`")


VIZWIZ_CONTRACTIONS = dict(_with_backticks(key, value) for key, value in CONTRACTIONS.items())
"""The published table of VizWiz, which has backticks for most apostrophes."""


def _punctuation(text: str) -> str:
    """Delete or blank the listed marks, then delete full stops, by the published rules.

    A mark is deleted everywhere if it has a space on either side anywhere in the text, or if the text has a comma
    between two digits; otherwise it becomes a space. A full stop is deleted unless a digit follows.
    """
    if not _ANY_MARK.search(text):
        return text
    has_thousands = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _MARKS:
        if mark in text:
            delete = has_thousands or f"{mark} " in text or f" {mark}" in text
            result = result.replace(mark, "" if delete else " ")
    return _FULL_STOP.sub("", result, count=_MAX_FULL_STOPS)


def _words(text: str, contractions: Mapping[str, str]) -> str:
    words = (word for word in text.lower().split() if word not in ARTICLES)
    words = (NUMBER_WORDS.get(word, word) for word in words)
    return " ".join(contractions.get(word, word) for word in words)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqav2(text: str) -> str:
    """Normalise a prediction as VQAv2's evaluator does."""
    return _words(_punctuation(_one_line(text)), CONTRACTIONS)


def vizwiz(text: str) -> str:
    """Normalise a prediction as VizWiz's evaluator does."""
    return _words(_punctuation(_one_line(text)), VIZWIZ_CONTRACTIONS)


def textvqa(text: str) -> str:
    """Normalise a prediction or an annotator's answer as TextVQA's evaluator does."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_punctuation(_one_line(text)), CONTRACTIONS)


_TEENS = (
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
)
_STRICT_NUMBERS = NUMBER_WORDS | {word: str(n) for n, word in enumerate((*_TEENS, "twenty"), start=11)}
_APOSTROPHES = re.compile("['`\u00b4\u2018\u2019]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_COLON = re.compile(r"(?<!\d):|:(?!\d)")
_NO_SEPARATORS = frozenset(".:%&#*")
"""Punctuation that may stay. Full stops and colons reach this point only inside numbers."""


def strict(text: str) -> str:
    """Normalise a prediction or an annotator's answer, so that answers with the same meaning become equal.

    Letter case, the encoding of accents, apostrophes, punctuation outside numbers, articles and spelt-out numbers up
    to twenty make no difference. An answer that consists of nothing else stays as it is, so that "A" does not become
    empty. The function is idempotent.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    plain = _THOUSANDS.sub("", _APOSTROPHES.sub("", folded))
    plain = _COLON.sub(" ", _FULL_STOP.sub("", plain))
    if not plain.isalnum():
        plain = "".join(" " if _separates(c) else c for c in plain)
    words = [_STRICT_NUMBERS.get(word, word) for word in plain.split()]
    words = [word for word in words if word not in ARTICLES] or words
    # Again, because a deleted mark may have stood between a letter and its accent.
    return unicodedata.normalize("NFKC", " ".join(words) or " ".join(folded.split()))


def _separates(character: str) -> bool:
    return unicodedata.category(character)[0] in "PZC" and character not in _NO_SEPARATORS


class Evaluator(NamedTuple):
    """The normalisers of one evaluator: one for predictions, one for annotators' answers."""

    prediction: Normaliser
    truth: Normaliser


def _cached(normaliser: Normaliser) -> Normaliser:
    """Annotators give few different answers, many times each."""
    return functools.lru_cache(maxsize=2**16)(normaliser)


VQAV2 = Evaluator(vqav2, _cached(_punctuation))
VIZWIZ = Evaluator(vizwiz, str)
TEXTVQA = Evaluator(textvqa, _cached(textvqa))
STRICT = Evaluator(strict, _cached(strict))


def soft_score(prediction: str, answers: Sequence[str]) -> float:
    """Agreement with annotators: with ten of them 0, 0.3, 0.6, 0.9 for zero to three matches, 1 for four or more.

    The mean over annotators of min(1, n / 3), where n of the *other* annotators gave the predicted answer.

    Args:
        prediction: Normalised.
        answers: The annotators' answers, normalised; at least one.
    """
    matches = answers.count(prediction)
    if matches == 0:
        return 0.0
    if matches > 3:
        return 1.0
    # The order of the sum matters: it makes the last bit equal to the published score.
    return sum(min(1.0, (matches - (answer == prediction)) / 3) for answer in answers) / len(answers)
