"""The commands vlm eval, vlm score and vlm show, from the command line to files."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from bench_files import WRITERS, truncate
from bench_models import ALONE, ScriptedModel, save_tiny_llava, save_tiny_vlm, suites
from PIL import Image

from localign.cli import main
from localign.vlm.evaluation import run
from localign.vlm.evaluation.results import read_answers
from localign.vlm.evaluation.run import evaluate
from localign.vlm.evaluation.show import ANSWERED, TRUE, draw_record, file_name
from localign.vlm.scoring import base

NAMES = ("ai2d", "refcoco", "gqa")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name in (*NAMES, "pope"):
        WRITERS[name](root)
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_tiny_vlm(root / "localign")
    save_tiny_vlm(root / "other", seed=1)
    save_tiny_llava(root / "llava")
    return root


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "MAX_NEW_TOKENS", 10)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the evaluation "one" of a scripted model."""
    root = tmp_path_factory.mktemp("scripted")
    asked = suites(root / "data", "refcoco", "gqa", "vqav2", "pope")
    evaluate(ScriptedModel(), asked, root / "one", ALONE, 8, "one")
    return root


def localign(command: str) -> None:
    assert main(shlex.split(command)) == 0


def line_of(capsys: pytest.CaptureFixture[str], command: str) -> str:
    """The single line with which a command is refused."""
    capsys.readouterr()
    assert main(shlex.split(command)) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    return said


def content(path: Path) -> Any:
    return json.loads(path.read_text())


# -- eval ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "options"), [("localign", ""), ("llava", "--boxes original:0-1000")])
def test_batches_change_nothing(
    model: str, options: str, data: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for size in (1, 8):
        localign(
            f"vlm eval {models / model} --benchmarks {','.join(NAMES)} --data {data} --allow-partial {options} "
            f"--device cpu --batch-size {size} --out {tmp_path / str(size)}"
        )
    assert "AI2D-final-Accuracy" in capsys.readouterr().out
    one, eight = (content(tmp_path / size / "results.json") for size in ("1", "8"))
    assert one == eight
    one, eight = (read_answers(tmp_path / size / "answers.jsonl") for size in ("1", "8"))
    for name in ("refcoco", "gqa"):
        assert one[name] == eight[name]
    for a, b in zip(one["ai2d"], eight["ai2d"], strict=True):
        assert a["answer"] == pytest.approx(b["answer"], rel=1e-4)
    assert len({record["answer"] for record in one["refcoco"]}) > 1


def test_a_finished_evaluation_loads_no_weights(
    data: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (
        f"vlm eval {models / 'localign'} --benchmarks gqa --data {data} --allow-partial --device cpu "
        f"--out {tmp_path}"
    )
    localign(command)
    before = content(tmp_path / "results.json")
    monkeypatch.setattr("localign.vlm.evaluation.localign_model.load_vlm", None)
    localign(command)
    assert content(tmp_path / "results.json") == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "eval needs a model, --benchmarks and --data"),
        ("MODEL --benchmarks gqa", "eval needs a model, --benchmarks and --data"),
        ("MODEL --benchmarks gqx --data DATA", "unknown benchmark 'gqx'; known: "),
        ("MODEL --benchmarks gqa,gqa --data DATA", "--benchmarks names a benchmark twice"),
        ("MODEL --benchmarks gqa --data DATA", "the data of gqa are not complete"),
        ("MODEL --benchmarks vsr --data DATA", "there is no file"),
        (
            "MODEL --benchmarks gqa --data DATA --limit 0 --allow-partial",
            "the limit of questions per split must be at least 1, not 0",
        ),
        ("MODEL --benchmarks gqa --data DATA --batch-size 0", "--batch-size must be at least 1"),
        ("DATA --benchmarks gqa --data DATA --allow-partial", "does not hold a model"),
        ("MODEL --benchmarks pope --data DATA --allow-partial", "the choice 'Yes' is 3 tokens"),
        ("MODEL --benchmarks refcoco --data DATA --allow-partial --boxes x", "'x' is not a box frame"),
        ("LLAVA --benchmarks refcoco --data DATA --allow-partial", "does not declare the frame of its boxes"),
        ("MODEL --benchmarks gqa --data DATA --scoring x", "--scoring takes one of"),
        (
            "MODEL --revision v1 --benchmarks gqa --data DATA --allow-partial",
            "--revision selects a revision of a model on the Hub",
        ),
    ],
)
def test_bad_use_is_one_line(
    options: str, said: str, data: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, path in (("MODEL", models / "localign"), ("LLAVA", models / "llava"), ("DATA", data)):
        options = options.replace(name, str(path))
    out = f" --out {tmp_path / 'out'} --device cpu" if "--data" in options else ""
    assert said in line_of(capsys, f"vlm eval {options}{out}")
    assert not (tmp_path / "out").exists()


# -- score ---------------------------------------------------------------------------------------------------


def test_rescoring_needs_neither_model_nor_data(scripted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(scripted / "one", folder)
    shutil.rmtree(folder / "responses")
    before = {name: (folder / name).read_text() for name in ("results.json", "answers.jsonl")}
    localign(f"vlm score {folder}")
    assert {name: (folder / name).read_text() for name in before} == before

    localign(f"vlm score {folder} --scoring published")
    results = content(folder / "results.json")["benchmarks"]
    assert {name: part["scoring"] for name, part in results.items()} == dict.fromkeys(results, "published")
    localign(f"vlm score {folder} --scoring strict")
    results = content(folder / "results.json")["benchmarks"]
    assert [results[name]["scoring"] for name in ("refcoco", "gqa", "vqav2", "pope")] == [
        "declared",
        "strict",
        "strict",
        "published",
    ]
    localign(f"vlm score {folder}")
    assert {name: (folder / name).read_text() for name in before} == before


def test_published_and_strict_scoring_differ(tmp_path: Path) -> None:
    model = ScriptedModel()
    model._words = lambda question: "T-shirt!"  # type: ignore[method-assign]
    evaluate(model, suites(tmp_path, "gqa"), tmp_path / "out", ALONE, 8)

    def accuracy() -> float:
        results = content(tmp_path / "out" / "results.json")["benchmarks"]
        return float(results["gqa"]["figures"]["accuracy"]["value"])

    assert accuracy() == 0  # the published rule deletes the hyphen in the prediction only
    localign(f"vlm score {tmp_path / 'out'} --scoring strict")
    assert accuracy() == 50


def test_bad_use_of_score_is_one_line(
    scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = scripted / "one"
    assert "score needs one or more folders" in line_of(capsys, "vlm score")
    assert "with itself" in line_of(capsys, f"vlm score {one} {one}")
    assert "--out has no effect" in line_of(capsys, f"vlm score {one} --out x")
    assert "there is no file" in line_of(capsys, f"vlm score {tmp_path}")
    shutil.copytree(one, tmp_path / "cut")
    answers = tmp_path / "cut" / "answers.jsonl"
    text = answers.read_text()
    answers.write_text(text[:-20])
    assert f"{answers}, line {text.count(chr(10))}, is not valid JSON" in line_of(
        capsys, f"vlm score {tmp_path / 'cut'}"
    )
    answers.write_text(text[: text.index("\n") + 1])
    assert "does not hold a complete evaluation" in line_of(capsys, f"vlm score {tmp_path / 'cut'}")
    answers.write_text('{"id": 1}\n')
    assert "line 1, is not an answer that localign wrote" in line_of(capsys, f"vlm score {tmp_path / 'cut'}")
    limited = suites(tmp_path / "data", "refcoco", limit=1)
    evaluate(ScriptedModel(), limited, tmp_path / "limited", ALONE, 8)
    assert "answered different questions" in line_of(capsys, f"vlm score {one} {tmp_path / 'limited'}")
    monkeypatch.setattr(base.Benchmark, "version", 2)
    assert "belong to version 1 of refcoco, but the current version is 2" in line_of(
        capsys, f"vlm score {one}"
    )


# -- show ----------------------------------------------------------------------------------------------------


def test_wrong_answers_are_drawn(scripted: Path, tmp_path: Path) -> None:
    localign(f"vlm show {scripted / 'one' / 'answers.jsonl'} --wrong --limit 3 --out {tmp_path / 'shown'}")
    wrong = [
        record
        for own in read_answers(scripted / "one" / "answers.jsonl").values()
        for record in own
        if record["score"] < 1
    ]
    assert {path.name for path in (tmp_path / "shown").iterdir()} == {file_name(r) for r in wrong[:3]}
    localign(f"vlm show {scripted / 'one'} --benchmarks pope --limit 100 --out {tmp_path / 'pope'}")
    assert len(list((tmp_path / "pope").iterdir())) == 6


def test_both_boxes_are_drawn_in_their_places(scripted: Path) -> None:
    record = read_answers(scripted / "one" / "answers.jsonl")["refcoco"][0]
    record |= {"truth": [0.0, 0.0, 0.5, 0.5], "parsed": [0.25, 0.25, 1.0, 1.0]}
    picture = draw_record(record)
    with Image.open(record["image"]) as image:
        scale = 640 / max(image.size)
        width, height = (round(scale * side) for side in image.size)
    assert picture.getpixel((12 + width // 2, 12 + height // 8)) == TRUE
    assert picture.getpixel((12 + 3 * width // 4, 12 + height // 4)) == ANSWERED
    assert (
        draw_record(record | {"parsed": None}).getpixel((12 + 3 * width // 4, 12 + height // 4)) != ANSWERED
    )


def test_long_and_strange_texts_fit(scripted: Path) -> None:
    record = read_answers(scripted / "one" / "answers.jsonl")["gqa"][0]
    long = draw_record(record | {"message": "word " * 2000, "answer": "x" * 5000, "id": "a/../b ü"})
    assert long.size[0] == 664
    assert long.size[1] < 2000
    name = file_name(record | {"id": "a/../b ü"})
    assert "/" not in name
    assert name != file_name(record | {"id": "a/../b ö"})


def test_bad_use_of_show_is_one_line(
    scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "show needs an answers.jsonl" in line_of(capsys, "vlm show")
    assert "there is no file" in line_of(capsys, f"vlm show {tmp_path}")
    assert "holds no answers to vsr" in line_of(capsys, f"vlm show {scripted / 'one'} --benchmarks vsr")
    assert "--limit must be at least 1" in line_of(capsys, f"vlm show {scripted / 'one'} --limit 0")


# -- processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_and_a_killed_run_equal_one(models: Path, tmp_path: Path) -> None:
    from engine_runs import kill_all, start

    data = tmp_path / "data"
    for name in NAMES:
        WRITERS[name](data)
    truncate(data / "download/refcoco/train2014/COCO_train2014_000000000456.jpg")

    def program(out: str) -> tuple[str, str]:
        arguments = (
            f"vlm eval {models / 'localign'} --benchmarks {','.join(NAMES)} --data {data} --allow-partial "
            f"--device cpu --batch-size 2 --out {tmp_path / out}"
        )
        return str(Path(__file__).with_name("bench_eval_program.py")), arguments

    for out, ranks in (("one", 1), ("two", 2)):
        process = start(ranks, *program(out))
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said.decode()
    assert len(list((tmp_path / "two" / "responses").iterdir())) == 2
    one = content(tmp_path / "one" / "results.json")
    assert one["benchmarks"]["refcoco"]["notes"][-1].startswith("1 of 5 questions are left out")
    assert one == content(tmp_path / "two" / "results.json")

    process = start(2, *program("killed"))
    deadline = time.monotonic() + 120
    responses = tmp_path / "killed" / "responses"
    while time.monotonic() < deadline and process.poll() is None:
        if any(path.stat().st_size for path in responses.glob("*.jsonl")):
            break
        time.sleep(0.005)
    kill_all(process)
    assert not (tmp_path / "killed" / "results.json").exists()
    process = start(1, *program("killed"))
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said.decode()
    assert content(tmp_path / "killed" / "results.json") == one
