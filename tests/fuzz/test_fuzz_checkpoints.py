"""Arbitrary files in a run folder are read or refused in one line."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import bounded, corrupted, json_values, result_or_refusal
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from localign.engine.checkpoints.replicated import BEST_FILE, MODEL_FILE, Checkpoints, reading
from localign.engine.checkpoints.sharded import OFFSETS_KEY, _Reader
from localign.engine.log import LOG_FILE, JsonLines, read_log
from localign.engine.run_folder import CONFIG_FILE, RESULTS_FILE, read_config, read_results
from localign.errors import UserError


def write(folder: Path) -> Checkpoints:
    """Write a checkpoint of step 1."""
    module = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    store = Checkpoints(folder)
    store.save(1, module, optimizer, {"x": [1.5e-5, "ü"], "best": None})
    return store


with tempfile.TemporaryDirectory() as _folder:
    CONTENTS = {path.name: path.read_bytes() for path in write(Path(_folder)).path(1).iterdir()}
"""The files of a checkpoint."""


def place(folder: Path, **others: bytes) -> Checkpoints:
    """Write a checkpoint in which some files are replaced, given by name without suffix."""
    path = folder / "step-0000001"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for name, content in CONTENTS.items():
        (path / name).write_bytes(others.get(name.partition(".")[0], content))
    return Checkpoints(folder)


names = st.sampled_from(sorted(CONTENTS))


@bounded
@given(
    names.flatmap(lambda name: st.tuples(st.just(name), corrupted(CONTENTS[name]) | st.binary(max_size=64)))
)
def test_a_changed_checkpoint_is_detected(tmp_path: Path, accident: tuple[str, bytes]) -> None:
    name, content = accident
    store = place(tmp_path, **{name.partition(".")[0]: content})
    if content == CONTENTS[name]:
        assert store.verify(1)
        return
    with pytest.raises(UserError, match="is damaged") as caught:
        store.load(1)
    assert "\n" not in str(caught.value)


@bounded
@given(corrupted(CONTENTS[MODEL_FILE]) | st.binary(max_size=64))
def test_tensors_without_checksums(tmp_path: Path, content: bytes) -> None:
    store = place(tmp_path, model=content, state=b'{"step": 1}')  # as older versions wrote it
    assert result_or_refusal(lambda: store.verify(1)) is False
    result_or_refusal(lambda: store.load(1))


@bounded
@given(json_values)
def test_any_state(tmp_path: Path, content: Any) -> None:
    store = place(tmp_path, state=json.dumps(content).encode())
    result_or_refusal(lambda: store.state(1))
    result_or_refusal(lambda: store.verify(1))


@bounded
@given(json_values | st.dictionaries(st.sampled_from(["a", "b"]), json_values), st.text(max_size=8))
def test_any_offsets_of_parts(tmp_path: Path, offsets: Any, text: str) -> None:
    header = text if text else json.dumps(offsets)
    tensors = {"a": torch.ones(2, 2), "b": torch.ones(())}
    save_file(tensors, tmp_path / "shard-00000.safetensors", metadata={OFFSETS_KEY: header})

    def read() -> None:
        with reading(tmp_path):
            _Reader(tmp_path).read_metadata()

    result_or_refusal(read)


@bounded
@given(st.lists(json_values.map(json.dumps) | st.text(max_size=20)), st.binary(max_size=8))
def test_any_log(tmp_path: Path, lines: list[str], end: bytes) -> None:
    whole = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    text = "".join(json.dumps(entry) + "\n" for entry in whole) + "\n".join(lines)
    (tmp_path / LOG_FILE).write_bytes(text.encode("utf-8", "replace") + end)
    assert read_log(tmp_path)[:2] == whole
    log = JsonLines(tmp_path, resumed_at=1)
    log.write({"step": 2, "loss": 3.0})
    log.close()
    entries = read_log(tmp_path)
    assert entries[-1] == {"step": 2, "loss": 3.0}
    assert all(entry["step"] <= 1 for entry in entries[:-1])


@bounded
@given(st.binary(max_size=40) | json_values.map(lambda v: json.dumps(v).encode()) | st.text().map(str.encode))
def test_any_small_file(tmp_path: Path, content: bytes) -> None:
    for name in (CONFIG_FILE, RESULTS_FILE, BEST_FILE):
        (tmp_path / name).write_bytes(content)
    for call in (lambda: read_config(tmp_path), lambda: read_results(tmp_path), Checkpoints(tmp_path).best):
        found = result_or_refusal(call)
        assert found is None or isinstance(found, dict)


@pytest.mark.parametrize("text", ["[" * 5000, "{a: " * 5000, "a: 2021-13-45", "a: !!python/name:os.system x"])
def test_hostile_yaml_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(UserError):
        read_config(tmp_path)
