"""Arbitrary files of conversations, image lists, class tables and weights are read or refused in one line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import bounded, corrupted, json_values, result_or_refusal
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from localign.backbones.weights import read_state_dict
from localign.data.classification import labels_of
from localign.data.sources import open_source
from localign.probing.classes import class_table
from localign.vlm.data.dialects import MalformedRecord, parse_record
from localign.vlm.data.jsonrecords import scan

turns = st.fixed_dictionaries(
    {},
    optional={
        "from": st.sampled_from(["human", "gpt", "user"]) | json_values,
        "value": st.text(max_size=8) | json_values,
    },
)
conversations = st.fixed_dictionaries(
    {},
    optional={
        "id": st.text(max_size=4) | json_values,
        "image": st.text(max_size=8) | json_values,
        "conversations": st.lists(turns, max_size=4) | json_values,
    },
)
records = st.lists(conversations | json_values, max_size=4)
SOME = json.dumps(
    [{"id": "ü", "image": "a.png", "conversations": [{"from": "human", "value": "hi"}] * 2}]
).encode()
files = (
    records.map(lambda r: json.dumps(r).encode())
    | records.map(lambda r: "\n".join(map(json.dumps, r)).encode())
    | corrupted(SOME)
    | st.binary(max_size=40)
)


@bounded
@given(files)
def test_any_file_of_conversations(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "records.json"
    file.write_bytes(content)
    spans = result_or_refusal(lambda: list(scan(file)))
    for span in spans or ():
        assert json.loads(content[span.begin : span.end]) == span.value or span.value != span.value
        try:
            parsed = parse_record(span.value)
        except MalformedRecord:
            continue
        assert all(said.encode() is not None for turn in parsed.record.turns for said in turn)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"[" + b"9" * 10_000 + b"]"])
def test_hostile_conversations_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "records.json").write_bytes(content)
    assert result_or_refusal(lambda: list(scan(tmp_path / "records.json"))) is None


@bounded
@given(
    json_values | st.dictionaries(st.integers(-2, 9).map(str) | st.text(max_size=3), json_values, max_size=4)
)
def test_any_class_table(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "classes.json"
    file.write_text(json.dumps(content))
    table = result_or_refusal(lambda: class_table(file))
    assert table is None or len(table.names) >= 1


@bounded
@given(st.binary(max_size=40))
def test_any_file_for_a_class_table(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "classes.json").write_bytes(content)
    result_or_refusal(lambda: class_table(tmp_path / "classes.json"))


cells = st.sampled_from(["a.png", "b.png", "label", "path", "dog", "cat", "", '"', ",", "\t"]) | st.text(
    max_size=6
)
tables = st.lists(st.lists(cells, max_size=3).map(",".join), max_size=4).map("\n".join)


@bounded
@given(
    tables.map(lambda t: t.encode("utf-8", "replace")) | st.binary(max_size=40),
    st.sampled_from([".txt", ".csv"]),
)
def test_any_list_of_images(tmp_path: Path, content: bytes, suffix: str) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    file = tmp_path / f"images{suffix}"
    file.write_bytes(content)
    source = result_or_refusal(lambda: open_source(str(file)))
    if source is not None:
        assert len(source) > 0
        result_or_refusal(lambda: labels_of(source, str(file)))


def torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"a": torch.ones(2)}}, buffer)
    return buffer.getvalue()


TENSORS, TORCH_FILE = save({"a": torch.ones(2), "b": torch.zeros(1, 2)}), torch_file()


@bounded
@given(
    st.tuples(st.just(".safetensors"), corrupted(TENSORS) | st.binary(max_size=40))
    | st.tuples(st.just(".pth"), corrupted(TORCH_FILE) | st.binary(max_size=40))
)
def test_any_weights(tmp_path: Path, file: tuple[str, bytes]) -> None:
    suffix, content = file
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    result_or_refusal(lambda: read_state_dict(path))
