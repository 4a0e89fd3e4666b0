"""Arbitrary model answers, answer files and annotation files are read or refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzzing import bounded, corrupted, finite, json_values, result_or_refusal
from hypothesis import given
from hypothesis import strategies as st

from localign.errors import UserError
from localign.text.reading import json_lines
from localign.vlm.evaluation.answer_cache import FOLDER, AnswerCacheWriter, read_answer_cache
from localign.vlm.scoring import normalisation
from localign.vlm.scoring.boxes import ORIGINAL, Box, BoxFrame, Size, parse_box, parse_published
from localign.vlm.scoring.readers import read_pickle

boxlike = st.text(alphabet="[]()0123456789.,-+eE inf\n", max_size=60) | st.text(max_size=40)
sizes = st.builds(Size, st.integers(1, 5000), st.integers(1, 5000))
FRAMES = [ORIGINAL, BoxFrame("padded-square", 100), BoxFrame("letterboxed", 1000, (224, 336))]
NORMALISERS = [normalisation.vqav2, normalisation.vizwiz, normalisation.textvqa, normalisation.strict]


@bounded
@given(boxlike, st.sampled_from(FRAMES), sizes)
def test_any_answer_for_a_box(text: str, frame: BoxFrame, size: Size) -> None:
    found = parse_box(text, frame, size)
    if isinstance(found, Box):
        x1, y1, x2, y2 = found.corners
        assert 0 <= x1 < x2 <= frame.scale
        assert 0 <= y1 < y2 <= frame.scale
        assert all(finite(c) for c in found.within_image().pixels())
    else:
        assert found in ("no box", "outside the frame", "corners out of order")


@bounded
@given(boxlike | json_values.map(json.dumps) | json_values.map(repr))
def test_any_answer_for_a_box_as_published(text: str) -> None:
    found = parse_published(text, ORIGINAL)
    if found is not None:
        x1, y1, x2, y2 = found
        assert 0 <= x1 < x2 <= 1
        assert 0 <= y1 < y2 <= 1


@bounded
@given(st.text(max_size=30) | st.sampled_from(["original", "letterboxed", "padded-square/100", "0..1000"]))
def test_any_frame(text: str) -> None:
    frame = result_or_refusal(lambda: BoxFrame.parse(text))
    assert frame is None or BoxFrame.parse(str(frame)) == frame


@pytest.mark.parametrize(
    "text", ["[" + "1" * 20_000, "1." * 10_000, "[" * 20_000, "[0.1, " * 5_000, " " * 20_000]
)
@pytest.mark.parametrize(
    "call", [lambda t: parse_box(t, ORIGINAL, Size(9, 9)), lambda t: parse_published(t, ORIGINAL)]
)
def test_endless_answers_take_no_time(text: str, call: Callable[[str], object]) -> None:
    began = time.process_time()
    call(text)
    assert time.process_time() - began < 1.0


@bounded
@given(st.text(max_size=60), st.lists(st.text(max_size=10), min_size=1, max_size=10))
def test_any_answer_in_words(text: str, truths: list[str]) -> None:
    for normalise in NORMALISERS:
        assert isinstance(normalise(text), str)
        assert 0 <= normalisation.soft_score(normalise(text), [normalise(t) for t in truths]) <= 1
    assert normalisation.strict(normalisation.strict(text)) == normalisation.strict(text)


entries = st.fixed_dictionaries(
    {"key": st.text(max_size=4) | json_values},
    optional={
        "text": st.text(max_size=10) | json_values,
        "probabilities": st.lists(st.floats()) | json_values,
    },
)
lines = st.lists((entries | json_values).map(json.dumps) | st.text(max_size=20), max_size=5)


@bounded
@given(lines, st.binary(max_size=6))
def test_any_file_of_answers(tmp_path: Path, content: list[str], end: bytes) -> None:
    (tmp_path / FOLDER).mkdir(exist_ok=True)
    whole = json.dumps({"key": "mine", "id": "q", "text": "a dog"})
    text = "\n".join([whole, *content])
    (tmp_path / FOLDER / "rank0.jsonl").write_bytes(text.encode("utf-8", "replace") + b"\n" + end)
    found = read_answer_cache(tmp_path, None)
    assert "mine" in found
    assert all(isinstance(key, str) and isinstance(said.text, str) for key, said in found.items())
    assert all(isinstance(p, float) for said in found.values() for p in said.probabilities)
    AnswerCacheWriter(tmp_path, 0).close()
    assert read_answer_cache(tmp_path, None).keys() == found.keys()


@bounded
@given(st.binary(max_size=60) | st.text(max_size=40).map(str.encode))
def test_any_json_lines(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    result_or_refusal(lambda: list(json_lines(tmp_path / "a.jsonl")))


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
)


@bounded
@given(plain_values, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_pickles_of_plain_values_are_read(tmp_path: Path, value: Any, protocol: int) -> None:
    (tmp_path / "refs.p").write_bytes(pickle.dumps(value, protocol))
    assert read_pickle(tmp_path / "refs.p") == value


SOME = [
    pickle.dumps([{"ref_id": 1, "sentences": [{"sent": "left dog"}], "ann_id": 2}], protocol)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
]
# Large indices into the list of remembered values make Python itself allocate as much.
_MEMO = (b"r", b"j")


@bounded
@given(st.binary(max_size=60) | st.sampled_from(SOME).flatmap(corrupted))
def test_any_pickle(tmp_path: Path, content: bytes) -> None:
    if any(mark in content for mark in _MEMO):
        return
    (tmp_path / "refs.p").write_bytes(content)
    result_or_refusal(lambda: read_pickle(tmp_path / "refs.p"))


class Calling:
    """Pickled, a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


RAN = "ran"
HOSTILE = {
    "system": pickle.dumps(Calling(os.system, f"touch {RAN}")),
    "system, oldest": pickle.dumps(Calling(os.system, f"touch {RAN}"), 0),
    "within a list": pickle.dumps([{"a": Calling(eval, f"open({RAN!r}, 'w')")}]),
    "mkdir": pickle.dumps(Calling(os.mkdir, RAN)),
    "a class": pickle.dumps(Path),
    "a function": pickle.dumps(len),
    "INST": b"(S'touch ran'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'touch ran'\no.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x09touch ran\x85R.",
    "EXT": b"\x80\x02\x82\x01.",
    "persistent": b"Pran\n.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_pickles_that_run_something_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("refs.p").write_bytes(HOSTILE[name])
    with pytest.raises(UserError, match="is not a pickle of plain values") as caught:
        read_pickle(Path("refs.p"))
    assert "\n" not in str(caught.value)
    assert os.listdir() == ["refs.p"]
