"""A checkpoint's JSON file with values of wrong types is one line, whether or not it is sealed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from localign.engine.checkpoints.checksums import read_sealed, sealed_text
from localign.engine.checkpoints.replicated import Checkpoints, load_optimizer_tensors, optimizer_tensors
from localign.engine.checkpoints.state import check_types
from localign.errors import UserError

GOOD: dict[str, Any] = {
    "config": {"lr": 0.1},
    "fingerprint": {"data": "abc"},
    "task": {},
    "guard": {"in_a_row": 0, "skipped": [3]},
    "digest": "00ff00ff00ff00ff",
    "bad_images": {"x.png": "empty file"},
    "seconds": 3.5,
    "best": {"step": 2, "val_loss": 0.5},
    "validation": {"step": 2, "metrics": {"val_loss": 0.5}},
}
FILES: Any = {"model.safetensors": {"bytes": 3, "blake2b": "0" * 32}}
WRONG: dict[str, list[Any]] = {
    "config": [[], "x", None],
    "fingerprint": ["x", {"data": 3}, []],
    "task": [[], None],
    "guard": [
        {},
        {"in_a_row": "0", "skipped": []},
        {"in_a_row": 0, "skipped": 3},
        {"in_a_row": 0, "skipped": ["3"]},
    ],
    "digest": [3, "xyz", "", "f" * 17, None],
    "bad_images": [[], {"x.png": 3}, None],
    "seconds": ["3", None, -1.0, True, [3]],
    "best": [3, {}, {"step": "2", "val_loss": 0.5}, {"step": 2, "val_loss": "low"}, {"step": 2}],
    "validation": [[], {"step": 2}, {"step": 2, "metrics": []}, {"step": 2, "metrics": {"val_loss": "low"}}],
}
CASES = [(name, value) for name, values in WRONG.items() for value in values]


def written(folder: Path, text: str) -> Checkpoints:
    (folder / "step-0000004").mkdir()
    (folder / "step-0000004" / "state.json").write_text(text)
    return Checkpoints(folder)


def one_line(store: Checkpoints, *words: str) -> None:
    for call in (store.state, store.verify, store.load):
        with pytest.raises(UserError) as caught:
            call(4)
        line = str(caught.value)
        assert "\n" not in line
        assert len(line) < 600
        for word in ("step-0000004", "is damaged", *words):
            assert word in line, line


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize(("name", "value"), CASES)
def test_a_field_of_a_wrong_type_is_named(tmp_path: Path, name: str, value: Any, sealed: bool) -> None:
    content = {"step": 4, **GOOD, name: value}
    text = sealed_text(content, FILES) if sealed else json.dumps(content)
    one_line(written(tmp_path, text), "state.json", name)


@pytest.mark.parametrize(
    "files",
    [
        [], "x", 3, {"a.safetensors": 3}, {"a.safetensors": {}}, {"a.safetensors": {"bytes": "3", "blake2b": "x"}},
        {"a.safetensors": {"bytes": 3, "blake2b": 4}}, {"a\nb": {"bytes": 3}}, {"a": [3, "x"]},
    ],
)  # fmt: skip
def test_a_list_of_files_of_a_wrong_type_is_one_line(tmp_path: Path, files: Any) -> None:
    text = json.dumps({"step": 4, **GOOD, "files": files, "checksum": "0" * 32}, indent=1)
    one_line(written(tmp_path, text), "state.json")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "{}",
        '{"step": "4"}',
        '{"step": true}',
        "[" * 100_000,
        '{"step": 4, "checksum": []}',
        "\x00",
    ],
)
def test_what_is_no_state_is_one_line(tmp_path: Path, text: str) -> None:
    one_line(written(tmp_path, text), "state.json")


@pytest.mark.parametrize(
    "best", ["3", "[]", "{}", '{"step": "4"}', '{"step": 4}', '{"step": 4, "val_loss": null}']
)
def test_a_mark_of_the_best_of_a_wrong_type_is_no_mark(tmp_path: Path, best: str) -> None:
    (tmp_path / "best.json").write_text(best)
    assert Checkpoints(tmp_path).best() is None


def test_good_values_are_read() -> None:
    check_types(GOOD)
    check_types({"best": None, "validation": {}})
    assert read_sealed(sealed_text({"step": 4, **GOOD}, FILES))["guard"] == GOOD["guard"]


STATE: dict[str, dict[str, torch.Tensor]] = {
    "wrong shape": {"exp_avg.weight": torch.ones(3)},
    "transposed": {"exp_avg.weight": torch.ones(2, 3)},
    "no name": {"exp_avg": torch.ones(1)},
    "no parameter": {"exp_avg.scale": torch.ones(1)},
    "missing moment": {"exp_avg_sq.weight": torch.ones(3, 2), "exp_avg.weight": torch.ones(3, 2)},
}


@pytest.mark.parametrize("case", STATE)
def test_optimizer_state_that_does_not_fit_is_one_line(case: str) -> None:
    module = torch.nn.Linear(2, 3, bias=False)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    tensors = {**optimizer_tensors(module, optimizer), **STATE[case]}
    if case == "missing moment":
        del tensors["step.weight"]
    with pytest.raises(UserError) as caught:
        load_optimizer_tensors(module, optimizer, tensors, "optimizer.safetensors")
    assert "optimizer.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
