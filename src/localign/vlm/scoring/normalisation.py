"""Free-text answers against those of several annotators: the published normalisers and a symmetric one.

The three published evaluators share their steps and differ in which side goes through which of them, so a
right answer is sometimes wrong there: VQAv2 rewrites the prediction "two" to "2", but no annotator's "two".
``strict`` rewrites both sides alike.
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
_MOST_FULL_STOPS = 32
"""The published code hands a flag of value 32 to the argument that limits replacements."""


_SPELT = """
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

CONTRACTIONS = dict(zip(_SPELT.split()[::2], _SPELT.split()[1::2], strict=True))
"""Of VQAv2 and TextVQA: nearly always the word with its apostrophes put in."""

_PLAIN_IN_VIZWIZ = frozenset(("aint", "arent", "cant", "couldve", "couldnt", "weve", "wheres", "whove"))
_PLAIN_KEYS_IN_VIZWIZ = frozenset(("couldn'tve", "hadn'tve"))


def _with_backticks(key: str, value: str) -> tuple[str, str]:
    if key in _PLAIN_IN_VIZWIZ:
        return key, value
    return (key if key in _PLAIN_KEYS_IN_VIZWIZ else key.replace("'", "`")), value.replace("'", "`")


VIZWIZ_CONTRACTIONS = dict(_with_backticks(key, value) for key, value in CONTRACTIONS.items())
"""The published table of VizWiz, most of whose apostrophes are backticks."""


def _punctuation(text: str) -> str:
    """Delete or blank the listed marks, then delete full stops, by the published rules.

    A mark is deleted throughout if anywhere in the text it has a space on either side, or if a comma stands
    between two digits; otherwise it becomes a space. A full stop goes unless a digit follows.
    """
    if not _ANY_MARK.search(text):
        return text
    in_number = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _MARKS:
        if mark in text:
            deleted = in_number or f"{mark} " in text or f" {mark}" in text
            result = result.replace(mark, "" if deleted else " ")
    return _FULL_STOP.sub("", result, count=_MOST_FULL_STOPS)


def _words(text: str, contractions: Mapping[str, str]) -> str:
    words = (word for word in text.lower().split() if word not in ARTICLES)
    words = (NUMBER_WORDS.get(word, word) for word in words)
    return " ".join(contractions.get(word, word) for word in words)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqav2(text: str) -> str:
    """A prediction as VQAv2's evaluator writes it."""
    return _words(_punctuation(_one_line(text)), CONTRACTIONS)


def vizwiz(text: str) -> str:
    """A prediction as VizWiz's evaluator writes it."""
    return _words(_punctuation(_one_line(text)), VIZWIZ_CONTRACTIONS)


def textvqa(text: str) -> str:
    """A prediction or an annotator's answer as TextVQA's evaluator writes it."""
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
"""Punctuation that is part of an answer. Full stops and colons are left only where they stand in a number."""


def strict(text: str) -> str:
    """One form for answers that mean the same; applied to predictions and annotators alike.

    Letter case, accents' encoding, apostrophes, punctuation outside numbers, articles and spelt-out numbers up
    to twenty make no difference. An answer that consists of nothing else is left as it is, so that "A" is no
    empty answer. Applying it twice changes nothing.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    plain = _THOUSANDS.sub("", _APOSTROPHES.sub("", folded))
    plain = _COLON.sub(" ", _FULL_STOP.sub("", plain))
    if not plain.isalnum():
        plain = "".join(" " if _separates(c) else c for c in plain)
    words = [_STRICT_NUMBERS.get(word, word) for word in plain.split()]
    told = [word for word in words if word not in ARTICLES] or words
    # Once more: what was taken out may have stood between a letter and its accent.
    return unicodedata.normalize("NFKC", " ".join(told) or " ".join(folded.split()))


def _separates(character: str) -> bool:
    return unicodedata.category(character)[0] in "PZC" and character not in _NO_SEPARATORS


class Evaluator(NamedTuple):
    """How either side of the comparison is written before it is made."""

    prediction: Normaliser
    truth: Normaliser


def _remembered(normaliser: Normaliser) -> Normaliser:
    """Annotators give few different answers, many times each."""
    return functools.lru_cache(maxsize=2**16)(normaliser)


VQAV2 = Evaluator(vqav2, _remembered(_punctuation))
VIZWIZ = Evaluator(vizwiz, str)
TEXTVQA = Evaluator(textvqa, _remembered(textvqa))
STRICT = Evaluator(strict, _remembered(strict))


def soft_score(prediction: str, answers: Sequence[str]) -> float:
    """Agreement with annotators, leaving each out in turn: 0 for none, 0.3, 0.6, 0.9, and 1 from four of ten on.

    The mean over annotators of min(1, n / 3), n being how many of the *others* gave the prediction.

    Args:
        prediction: Normalised.
        answers: Of the annotators, normalised; at least one.
    """
    matches = answers.count(prediction)
    if matches == 0:
        return 0.0
    if matches > 3:
        return 1.0
    # Summed one by one, in order: so the last bit is the published one too.
    return sum(min(1.0, (matches - (answer == prediction)) / 3) for answer in answers) / len(answers)
