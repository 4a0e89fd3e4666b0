"""Reading records in LLaVA's format; an error is one line that names the record."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vlm_data import IMAGE_TOKENS, mixed_data, record, tiny_encoder, turn, write_image, write_json

from localign.errors import RunFailure, UserError
from localign.vlm.data import jsonrecords
from localign.vlm.data.checks import LengthBin, check
from localign.vlm.data.dialects import Record
from localign.vlm.data.records import Conversations, Finding


def test_reads_lists_and_lines_alike(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "x.png")
    entries = [
        {"id": 3, "image": "a/x.png", "model": "other keys are ignored",
         "conversations": [turn("human", "<image>\nWhat?"), turn("gpt", "A kité\u2028.")]},
        {"id": "t", "image": None,
         "conversations": [turn("user", "a"), turn("assistant", ""), turn("user", "b"), turn("assistant", "c")]},
    ]  # fmt: skip
    expected = [
        Record("3", "a/x.png", (("<image>\nWhat?", "A kité\u2028."),)),
        Record("t", None, (("a", ""), ("b", "c"))),
    ]
    forms = {
        "list.json": json.dumps(entries),
        "spread.json": "\ufeff" + json.dumps(entries, indent=2, ensure_ascii=False) + "\n",
        "lines.jsonl": "\n\n".join(json.dumps(entry) for entry in entries) + "\n",
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        data = Conversations.open([tmp_path / name])
        assert [data.record(i) for i in range(len(data))] == expected, name
        assert data.has_image.tolist() == [True, False]
        assert data.words.tolist() == [
            5,
            3,
        ]  # "<image>" is a word, as published; a line separator ends a word
        assert data.turns.tolist() == [1, 2]
    both = Conversations.open([tmp_path / "list.json", tmp_path / "lines.jsonl"])
    assert len(both) == 4
    assert "lines.jsonl, record 2 (id 't')" in both.name(3)
    assert both.record(2) == expected[0]


def test_records_longer_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks may end anywhere, even within a number, an escape or a multi-byte character."""
    entries = [
        {"id": i, "n": 12345, "t": True, "conversations": [turn("human", 'é"\\\n' * i), turn("gpt", "ü")]}
        for i in range(4)
    ]
    texts = [json.dumps(entries), "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)]
    for text in texts:
        path = tmp_path / "data.json"
        path.write_text(text, encoding="utf-8")
        whole = [(span.begin, span.end, span.value) for span in jsonrecords.scan(path)]
        assert [value for _, _, value in whole] == entries
        assert [json.loads(path.read_bytes()[begin:end]) for begin, end, _ in whole] == entries
        for block in (1, 2, 3, 7, 50):
            monkeypatch.setattr(jsonrecords, "_BLOCK", block)
            assert [(s.begin, s.end, s.value) for s in jsonrecords.scan(path)] == whole, block
        monkeypatch.undo()


GOOD = [turn("human", "a"), turn("gpt", "b")]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"id": [1], "conversations": GOOD}, r"record 2 \(id \[1\]\): its id is neither"),
        ({"id": "x"}, r"record 2 \(id 'x'\): it has no list of conversations"),
        ({"id": "x", "conversations": []}, "its conversation has no answered question"),
        ({"id": "x", "conversations": GOOD[:1]}, "its conversation has no answered question"),
        ({"id": "x", "conversations": GOOD[::-1]}, "turn 1 of its conversation is by 'gpt', not 'human' or 'user'"),
        ({"id": "x", "conversations": [*GOOD, turn("system", "s")]}, "turn 3 of its conversation is by 'system'"),
        ({"id": "x", "conversations": [*GOOD, *GOOD[1:]]}, "turn 3 of its conversation is by 'gpt'"),
        ({"id": "x", "conversations": [{"from": "human"}, GOOD[1]]}, "turn 1 of its conversation has no 'value'"),
        ({"id": "x", "conversations": [{"value": "a"}, GOOD[1]]}, "turn 1 of its conversation has no 'from'"),
        ({"id": "x", "conversations": ["a", "b"]}, "turn 1 of its conversation has no 'from'"),
        ({"id": "x", "conversations": [GOOD[0], turn("gpt", 5)]}, "the value of turn 2 of its conversation is not"),
        ({"id": "x", "image": ["a", "b"], "conversations": GOOD}, "its image is not the path of one file"),
        ({"id": "x", "image": "/", "conversations": GOOD}, "its image is not the path of one file"),
        (7, "record 2: not a JSON object"),
    ],
)  # fmt: skip
def test_malformed_records(tmp_path: Path, entry: Any, reason: str) -> None:
    path = write_json(tmp_path / "data.json", [record(0), entry])
    with pytest.raises(UserError, match=f"data.json, {reason}" if reason[0] == "r" else reason) as caught:
        Conversations.open([path])
    assert "record 2" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "neither a JSON list of records nor JSON lines"),
        ("id,image\n", "neither a JSON list"),
        ("[]", "no conversations"),
        ('[{"id": 1} {"id": 2}]', "record 1.*no list of conversations"),
        ("[%s %s]", "record 1: a comma or the end of the list is missing"),
        ("[%s, %s", "record 2: a comma or the end of the list is missing"),
        ("[%s,]", r"record 2: not valid JSON: Expecting value \(byte \d+\)"),
        ("[%s] x", "record 1: there is text after the end of the list"),
        ('{"id": "a\n"}', "record 1: not valid JSON: Invalid control character"),
        ('{"id": "a', "record 1: not valid JSON: Unterminated string"),
        ("[" * 100000, "record 1: not valid JSON"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(text.replace("%s", json.dumps(record(0))), encoding="utf-8")
    with pytest.raises(UserError, match=reason):
        Conversations.open([path])


def test_missing_files_and_files_that_are_not_text(tmp_path: Path) -> None:
    write_json(tmp_path / "mix665k.json", [record(0)])
    with pytest.raises(UserError, match=r"there is no file .*mix655k.json; did you mean 'mix665k.json'"):
        Conversations.open([tmp_path / "mix655k.json"])
    with pytest.raises(UserError, match=r"there is no folder of images .*/pictures"):
        Conversations.open([tmp_path / "mix665k.json"], [tmp_path / "pictures"])
    (tmp_path / "latin.json").write_bytes('[{"id": "é"}]'.encode("latin-1"))
    with pytest.raises(UserError, match="record 1: not UTF-8 text"):
        Conversations.open([tmp_path / "latin.json"])
    with pytest.raises(UserError, match="no conversations: give at least one"):
        Conversations.open([])


def test_unpaired_surrogates_become_text_that_can_be_encoded(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(
        '[{"id": "x", "conversations": [{"from": "human", "value": "\\ud83d\\ude00 \\ud83d"}, '
        '{"from": "gpt", "value": "y"}]}]'
    )
    ((question, _),) = Conversations.open([tmp_path / "data.json"]).record(0).turns
    assert question == "\U0001f600 \ufffd"


def test_unanswered_last_question_is_left_out(tmp_path: Path) -> None:
    entry = {"id": "x", "conversations": [*GOOD, turn("human", "and so?")]}
    data = Conversations.open([write_json(tmp_path / "data.json", [entry])])
    assert data.record(0).turns == (("a", "b"),)
    assert data.words.tolist() == [4]  # counted with all turns, as published


def test_image_roots(tmp_path: Path) -> None:
    entries = [record(0, image="coco/train/0.png"), record(1, image="vg/1.png"), record(2, image="own/2.png")]
    path = write_json(tmp_path / "json" / "data.json", entries)
    write_image(tmp_path / "elsewhere" / "0.png", 10)
    write_image(tmp_path / "llava" / "vg" / "1.png", 11)
    write_image(tmp_path / "llava" / "coco" / "train" / "0.png", 99)
    write_image(tmp_path / "more" / "own" / "2.png", 12)
    roots: list[str | Path] = [f"coco/train={tmp_path / 'elsewhere'}", tmp_path / "llava", tmp_path / "more"]
    data = Conversations.open([path], roots)
    shown = [np.asarray(data.load_image(i, entries[i]["image"]))[0, 0, 0] for i in range(3)]
    assert shown == [10, 11, 12]  # the first root that has it


def test_images_beside_the_file_without_roots(tmp_path: Path) -> None:
    one = write_json(tmp_path / "a" / "data.json", [record(0, image="x.png")])
    two = write_json(tmp_path / "b" / "data.json", [record(1, image="x.png")])
    write_image(tmp_path / "a" / "x.png", 1)
    write_image(tmp_path / "b" / "x.png", 2)
    data = Conversations.open([one, two])
    assert [np.asarray(data.load_image(i, "x.png"))[0, 0, 0] for i in range(2)] == [1, 2]


def test_missing_images(tmp_path: Path) -> None:
    write_image(tmp_path / "0.png")
    entries = [record(0, image="0.png"), record(1, image="gone.png"), record(2, image="gone.png"), record(3)]
    path = write_json(tmp_path / "data.json", entries)
    with pytest.raises(
        UserError, match=r"1 images of 2 records are missing; the first is gone.png of .*record 2 \(id 'r1'\)"
    ):
        Conversations.open([path])
    data = Conversations.open([path], skip_missing=True)
    assert [data.record(i).id for i in range(len(data))] == ["r0", "r3"]
    assert (data.skipped, data.missing) == (2, ("gone.png",))
    assert "record 4 (id 'r3')" in data.name(1)
    write_image(tmp_path / "gone.png")
    assert Conversations.open([path]).fingerprint() != data.fingerprint()
    with pytest.raises(UserError, match=r"all 1 images of .* are missing; the first is 0.png"):
        Conversations.open([write_json(tmp_path / "else" / "d.json", entries[:1])], skip_missing=True)


def test_fingerprint_is_of_the_contents(tmp_path: Path) -> None:
    a = write_json(tmp_path / "a.json", [record(0), record(1)])
    b = write_json(tmp_path / "b.json", [record(0), record(1)])
    c = write_json(tmp_path / "c.json", [record(1), record(0)])
    prints = [Conversations.open([path]).fingerprint() for path in (a, b, c)]
    assert prints[0] == prints[1] != prints[2]


def test_survives_pickling_and_notices_changes(tmp_path: Path) -> None:
    data = mixed_data(tmp_path)
    again = pickle.loads(pickle.dumps(data))
    assert again.record(5) == data.record(5)
    write_json(tmp_path / "data.json", [record(0)])
    with pytest.raises(RunFailure, match="changed while it was in use"):
        data.record(5)


def test_check_counts_everything(tmp_path: Path) -> None:
    write_image(tmp_path / "0.png")
    entries = [
        record(0, image="0.png", turns=2),
        record(0, image="gone.png"),
        record(2, words=100),
        {"id": "bad", "conversations": GOOD[::-1]},
        {"id": "open", "conversations": [*GOOD, GOOD[0]]},
        {"id": "mute", "conversations": [turn("human", "q" * 300), turn("gpt", " ")]},
    ]
    path = write_json(tmp_path / "data.json", entries)
    found = check([path], encoder=tiny_encoder(max_length=200), missing_list=tmp_path / "missing.txt")
    assert (found.records, found.turns, found.images, found.text_only) == (5, 6, 2, 3)
    assert found.malformed == Finding(
        1, (f"{path}, record 4 (id 'bad'): turn 1 of its conversation is by 'gpt', not 'human' or 'user'",)
    )
    assert (found.missing, found.missing_records) == (("gone.png",), 1)
    assert (tmp_path / "missing.txt").read_text() == "gone.png\n"
    assert found.empty_answers == Finding(1, (f"{path}, record 6 (id 'mute')",))
    assert found.unanswered == Finding(1, (f"{path}, record 5 (id 'open')",))
    assert found.repeated_ids == Finding(1, ("r0",))
    assert found.over_long.count == 2
    assert found.nothing_to_learn == Finding(1, (f"{path}, record 6 (id 'mute')",))
    assert found.lengths is not None
    assert found.lengths[0] == LengthBin(
        0, 3
    )  # below 64 tokens: 2 turns of 18 + 6 bytes, with the image tokens
    assert sum(b.records for b in found.lengths) == 5
    assert not found.ready


def test_check_of_good_data(tmp_path: Path) -> None:
    mixed_data(tmp_path, count=6)
    found = check([tmp_path / "data.json"], missing_list=tmp_path / "missing.txt")
    assert found.ready
    assert found.lengths is None
    assert not (tmp_path / "missing.txt").exists()
    lengths = check([tmp_path / "data.json"], encoder=tiny_encoder()).lengths
    assert lengths is not None
    assert sum(b.records for b in lengths) == 6


def test_length_counts_image_tokens() -> None:
    encoder = tiny_encoder()
    with_image = Record("a", "x.png", (("q", "a"),))
    assert encoder.length(with_image) - encoder.length(Record("a", None, (("q", "a"),))) == IMAGE_TOKENS
