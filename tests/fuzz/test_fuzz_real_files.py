"""Real files with structured damage, and large hostile files: every text reader reads them or refuses in one line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import EXAMPLES, result_or_refusal
from real_files import LARGE, SHARED, damaged_text, mutated

from localign.engine import run_folder
from localign.probing.classes import class_table
from localign.recipes import FOLDER, read_options
from localign.text.reading import read_json_object
from localign.vlm.benchmarks.pope import POPE
from localign.vlm.benchmarks.vsr import VSR
from localign.vlm.data.checks import check
from localign.vlm.data.records import Conversations
from localign.vlm.data.scene_dataset import read_questions
from localign.vlm.evaluation.results import read_answers

COMPAT = Path(__file__).resolve().parents[1] / "compat" / "v0.1.0"
OFFICIAL = SHARED / "official"
needs_shared = pytest.mark.skipif(not OFFICIAL.is_dir(), reason="../shared/data/official is not there")


def lines(path: Path, count: int = 20) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]


@needs_shared
@pytest.mark.parametrize("seed", range(EXAMPLES))
def test_conversations(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    real = json.loads((OFFICIAL / "llava-mix" / "llava_v1_5_mix1k.json").read_text(encoding="utf-8"))
    records = mutated(draw.sample(real, 5), draw, 4)
    file = tmp_path / "data.json"
    text = json.dumps(records)
    file.write_bytes(damaged_text(text, draw) if seed % 3 == 0 else text.encode())
    found = result_or_refusal(lambda: check([file]))
    if found is None:
        return
    assert all("\n" not in name for name in found.malformed.first)
    kept = result_or_refusal(
        lambda: Conversations.open([file], skip_missing=True, skip_malformed=True, allow_outside=True)
    )
    for index in range(len(kept) if kept else 0):
        assert kept is not None
        kept.record(index)


@needs_shared
@pytest.mark.parametrize("seed", range(EXAMPLES))
@pytest.mark.parametrize("name", ["pope", "vsr"])
def test_question_files(tmp_path: Path, name: str, seed: int) -> None:
    draw = random.Random(seed)
    folder = tmp_path / "download" / name
    folder.mkdir(parents=True)
    files = [f"coco_pope_{s}.json" for s in POPE.splits] if name == "pope" else ["test.jsonl"]
    for file in files:
        records = mutated(lines(OFFICIAL / name / file), draw, 3)
        text = "\n".join(map(json.dumps, records))
        (folder / file).write_bytes(damaged_text(text, draw) if seed % 3 == 0 else text.encode())
    suite = POPE() if name == "pope" else VSR()
    result_or_refusal(lambda: list(suite.questions(tmp_path)))
    result_or_refusal(lambda: suite.read(tmp_path, allow_partial=True))


@needs_shared
@pytest.mark.parametrize("seed", range(EXAMPLES))
def test_class_tables(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    real = json.loads((SHARED / "coco-sample" / "classes.json").read_text(encoding="utf-8"))
    text = json.dumps(mutated(real, draw, 3))
    (tmp_path / "classes.json").write_bytes(damaged_text(text, draw) if seed % 3 == 0 else text.encode())
    result_or_refusal(lambda: class_table(tmp_path / "classes.json"))


@pytest.mark.parametrize("seed", range(EXAMPLES))
def test_files_of_options(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    path = draw.choice(sorted(FOLDER.rglob("*.yaml")))
    text = yaml.safe_dump(
        mutated(yaml.safe_load(path.read_text(encoding="utf-8")), draw, 3), allow_unicode=True
    )
    (tmp_path / "options.yaml").write_bytes(
        damaged_text(text, draw) if seed % 3 == 0 else text.encode("utf-8", "replace")
    )
    result_or_refusal(lambda: read_options(tmp_path / "options.yaml"))


@pytest.mark.parametrize("seed", range(EXAMPLES))
def test_run_folders(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    config = (COMPAT / "vlm-finished" / "config.yaml").read_text(encoding="utf-8")
    results = (COMPAT / "vlm-finished" / "results.json").read_text(encoding="utf-8")
    values = yaml.safe_dump(mutated(yaml.safe_load(config), draw, 3), allow_unicode=True)
    found = json.dumps(mutated(json.loads(results), draw, 3))
    is_damaged = seed % 3 == 0
    (tmp_path / "config.yaml").write_bytes(
        damaged_text(values, draw) if is_damaged else values.encode("utf-8", "replace")
    )
    (tmp_path / "results.json").write_bytes(damaged_text(found, draw) if is_damaged else found.encode())
    result_or_refusal(lambda: run_folder.read_config(tmp_path))
    result_or_refusal(lambda: run_folder.read_results(tmp_path))


READERS: dict[str, Callable[[Path], Any]] = {
    "records": lambda path: check([path]),
    "classes": class_table,
    "options": read_options,
    "object": read_json_object,
    "answers": read_answers,
    "scenes": read_questions,
    "config": lambda path: run_folder.read_config(path.parent),
    "results": lambda path: run_folder.read_results(path.parent),
}
HOSTILE = [
    *(
        "[",
        "{",
        '{"a":',
        "- ",
        "? ",
        "a: ",
        "&a ",
        "*a ",
        "!!binary ",
        "\t",
        "\0",
        "\\",
        '"',
        "'",
        "#\n",
        ",",
        "1:",
    ),
    *(
        "0",
        "9",
        "[]",
        "{}",
        "<<: ",
        "%",
        "|\n",
        "a\n",
        "---\n",
        '"\\ud800"',
        "\u2028",
        "\ufeff",
        "!!set {a}\n",
    ),
]


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("piece", HOSTILE, ids=range(len(HOSTILE)))
def test_large_hostile_files(tmp_path: Path, name: str, piece: str) -> None:
    content = piece * (LARGE // len(piece))
    for file in ("file", "config.yaml", "results.json"):
        (tmp_path / file).write_text(content, encoding="utf-8")
    result_or_refusal(lambda: READERS[name](tmp_path / "file"))
