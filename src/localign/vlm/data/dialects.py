"""The ways in which people write a conversation as a JSON object, and what is refused in them.

LLaVA: ``{"id": ..., "image": path, "conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}``.
Messages: ``{"images": [path], "messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}``, where a
content may be a list of parts of text and one image. Both may begin with a system turn, and the id may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HUMAN = frozenset({"human", "user"})
ASSISTANT = frozenset({"gpt", "assistant"})
"""Names of the two roles, in lower case."""
SYSTEM = "system"

IMAGE_MARK = "<image>"

_CONVERSATION_KEYS = ("conversations", "messages")
_IMAGE_KEYS = ("image", "images")
_MEDIA_KEYS = frozenset(
    (
        *("video", "videos", "video_path", "audio", "audios", "audio_path", "frames", "picture", "pictures"),
        *("image_path", "image_paths", "image_url", "image_urls", "image_file", "img", "imgs", "img_path"),
    )
)
"""Keys of images and media that are not read. To ignore them would turn the record into text alone."""
_USED_KEYS = frozenset({"id", SYSTEM, *_CONVERSATION_KEYS, *_IMAGE_KEYS, *_MEDIA_KEYS})
_WEIGHT_KEYS = ("weight", "loss", "loss_weight", "train")
"""Keys of a turn that exclude it from the loss unless they are 1 or true."""
_TURN_KEYS = (("from", "value"), ("role", "content"))


@dataclass(frozen=True)
class Record:
    """One conversation, about one image or none."""

    id: str
    """Empty for a record without an id."""
    image: str | None
    """Path as written in the file, relative to an image root."""
    turns: tuple[tuple[str, str], ...]
    """(question, answer) pairs, at least one. A system turn stands before the first question."""


class MalformedRecord(Exception):
    """A record cannot be read as a conversation; the message gives the reason on one line."""


@dataclass(frozen=True)
class ParsedRecord:
    """A record and its size."""

    record: Record
    words: int
    """Words, separated by white space, of all turns in the file: the published measure of length."""
    characters: int
    """Characters of all (question, answer) pairs."""
    unanswered: bool
    """Whether the last question had no answer and was dropped."""
    unused: tuple[str, ...] = ()
    """Keys of the record that have no meaning here."""


def parse_record(value: Any) -> ParsedRecord:
    """Parse a record's JSON object.

    Raises:
        MalformedRecord: The object is no conversation, or holds an image or another medium that cannot be used.
    """
    if not isinstance(value, dict):
        raise MalformedRecord("not a JSON object")
    name = _name(value.get("id"))
    images = [path for key in _IMAGE_KEYS for path in _paths(value.get(key))]
    for key in _MEDIA_KEYS & value.keys():
        if value[key]:
            raise MalformedRecord(f"it has the key {key!r}; only an image under 'image' or 'images' is read")
    system, texts = _texts(value, images)
    image = _one_image(images, sum(text.count(IMAGE_MARK) for text in texts))
    turns = list(zip(texts[0::2], texts[1::2], strict=False))
    if system.strip():
        turns[0] = (_with_system(system, turns[0][0]), turns[0][1])
    return ParsedRecord(
        Record(name, image, tuple(turns)),
        words=sum(len(text.split()) for text in (*texts, system)),
        characters=sum(len(question) + len(answer) for question, answer in turns),
        unanswered=len(texts) % 2 == 1,
        unused=tuple(sorted(value.keys() - _USED_KEYS)),
    )


def _name(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise MalformedRecord("its id is neither a string nor an integer")
    return str(value)


# -- the image -----------------------------------------------------------------------------------------------


def _paths(value: Any) -> list[str]:
    """The paths under a key of images: a path, a list of paths, or nothing."""
    if not value:
        return []
    if isinstance(value, list) and not any(isinstance(part, list) for part in value):
        return [path for part in value for path in _paths(part)]
    if isinstance(value, dict) and not value.get("bytes"):  # as the datasets library writes an image
        value = value.get("path")
    if not isinstance(value, str) or (value and not value.strip("/")):
        raise MalformedRecord("its image is not the path of one file")
    return [value] if value.strip() else []


def _one_image(paths: list[str], marks: int) -> str | None:
    distinct = list(dict.fromkeys(paths))
    if len(distinct) > 1:
        raise MalformedRecord(
            f"its image is not the path of one file, but of {len(distinct)}; one image is read"
        )
    if marks > 1:
        raise MalformedRecord(f"its text has {marks} {IMAGE_MARK} marks; a record has one image")
    if marks and not distinct:
        raise MalformedRecord(f"its text has the mark {IMAGE_MARK}, but the record has no image")
    return distinct[0] if distinct else None


# -- the turns -----------------------------------------------------------------------------------------------


def _texts(record: Mapping[str, Any], images: list[str]) -> tuple[str, list[str]]:
    """The system text, and the texts of questions and answers in turn. Images in them are added to ``images``."""
    given = [record[key] for key in _CONVERSATION_KEYS if record.get(key) is not None]
    if len(given) > 1:
        raise MalformedRecord("it has both 'conversations' and 'messages'")
    if not given or not isinstance(given[0], list):
        raise MalformedRecord("it has no list of conversations")
    system = record.get(SYSTEM) or ""
    if not isinstance(system, str):
        raise MalformedRecord("its system text is not a string")
    texts: list[str] = []
    for number, turn in enumerate(given[0], start=1):
        role, text = _turn(turn, f"turn {number} of its conversation", images)
        if number == 1 and role.strip().lower() == SYSTEM:
            system = f"{system}\n{text}" if system else text
            continue
        expected = ASSISTANT if len(texts) % 2 else HUMAN
        if role not in expected and role.strip().lower() not in expected:
            raise MalformedRecord(
                f"turn {number} of its conversation is by {role!r:.60}, not {_names(expected)}"
            )
        texts.append(text)
    if len(texts) < 2:
        raise MalformedRecord("its conversation has no answered question")
    return _encodable(system), texts


def _turn(turn: Any, where: str, images: list[str]) -> tuple[str, str]:
    """Role and text of a turn."""
    keys = (
        _TURN_KEYS[1] if isinstance(turn, dict) and "role" in turn and "from" not in turn else _TURN_KEYS[0]
    )
    for key in keys:
        if not isinstance(turn, dict) or key not in turn:
            raise MalformedRecord(f"{where} has no {key!r}")
    role, text = turn[keys[0]], turn[keys[1]]
    if not isinstance(role, str):
        raise MalformedRecord(f"{where} is by {role!r:.60}, not by one of the two roles")
    if len(turn) > 2:
        _check_weight(turn, where)
    if isinstance(text, list):
        text = "\n".join(_part(part, where, images) for part in text)
    if not isinstance(text, str):
        raise MalformedRecord(f"the value of {where} is not a string")
    return role, _encodable(text)


def _check_weight(turn: Mapping[str, Any], where: str) -> None:
    for key in _WEIGHT_KEYS:
        if turn.get(key) is not None and turn[key] not in (1, True):
            raise MalformedRecord(
                f"{where} has {key!r}: {turn[key]!r:.60}, but every answer is learned alike"
            )


def _part(part: Any, where: str, images: list[str]) -> str:
    """The text of one part of a message."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind == "image":
        images += [path for key in ("image", "path") for path in _paths(part.get(key))]
        return IMAGE_MARK
    raise MalformedRecord(f"{where} has a part that is neither a text nor an image: {part!r:.60}")


def _with_system(system: str, question: str) -> str:
    mark = f"{IMAGE_MARK}\n" if IMAGE_MARK in question else ""
    return f"{mark}{system.strip()}\n\n{question.replace(IMAGE_MARK, '').strip()}"


def _encodable(text: str) -> str:
    if text.isascii():
        return text
    # JSON can contain half a surrogate pair, which tokenizers refuse.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _names(roles: frozenset[str]) -> str:
    return " or ".join(repr(role) for role in sorted(roles))
