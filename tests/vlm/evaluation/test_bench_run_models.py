"""Models behind the interface: answers do not depend on the batch, and choices are compared by their first token."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from bench_models import CPU, save_tiny_idefics, save_tiny_llava, save_tiny_vlm, suites
from vlm_models import picture

from localign.errors import UserError
from localign.vlm.evaluation.generation import Query
from localign.vlm.evaluation.model_base import LazyModel
from localign.vlm.evaluation.models import fingerprint_of, open_model
from localign.vlm.scoring.boxes import ORIGINAL, BoxFrame
from localign.vlm.scoring.questions import Question

SAVERS: dict[str, Callable[[Path], Path]] = {
    "localign": save_tiny_vlm,
    "native": partial(save_tiny_vlm, max_patches=9),
    "llava": save_tiny_llava,
    "idefics": save_tiny_idefics,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save(root / name) for name, save in SAVERS.items()}


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Question]]:
    root = tmp_path_factory.mktemp("data")
    return {suite.name: data.questions for suite, data in suites(root, "gqa", "refcoco", "tallyqa", "ai2d")}


def opened(folder: Path, frame: BoxFrame | None = None) -> LazyModel:
    return open_model(str(folder), "x", CPU, torch.float32, frame)


@pytest.mark.parametrize("kind", SAVERS)
def test_texts_do_not_depend_on_the_batch(
    kind: str, folders: dict[str, Path], questions: dict[str, list[Question]]
) -> None:
    model = opened(folders[kind])
    asked = questions["gqa"] + questions["refcoco"]  # of different lengths, on images of different sizes
    texts = model.answer_texts(asked, 12)
    assert texts == [model.answer_texts([question], 12)[0] for question in asked]
    assert len(set(texts)) > 1


@pytest.mark.parametrize("kind", SAVERS)
def test_probabilities_do_not_depend_on_the_batch(
    kind: str, folders: dict[str, Path], questions: dict[str, list[Question]]
) -> None:
    model = opened(folders[kind])
    asked = questions["tallyqa"] + questions["ai2d"]
    model.check_choices(asked[0].choices)
    rows = model.choice_probabilities(asked)
    assert [len(row) for row in rows] == [len(question.choices) for question in asked]
    for question, row in zip(asked, rows, strict=True):
        assert row == pytest.approx(model.choice_probabilities([question])[0], rel=1e-3)
        assert 0 < sum(row) < 1


@pytest.mark.parametrize("kind", SAVERS)
def test_probabilities_are_those_of_the_letters_after_the_prompt(
    kind: str, folders: dict[str, Path], questions: dict[str, list[Question]]
) -> None:
    model, question = opened(folders[kind]), questions["ai2d"][0]
    batch = model._batch([question])
    with torch.inference_mode():
        logits = model.model(**batch).logits[0, -1]
    letters = [model.tokenizer.encode(c, add_special_tokens=False)[0] for c in question.choices]
    expected = logits.softmax(0)[letters].tolist()
    assert model.choice_probabilities([question])[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", SAVERS)
def test_questions_without_an_image(kind: str, folders: dict[str, Path]) -> None:
    model = opened(folders[kind])
    asked = [Query("Say hello."), Query("What is the capital of France?")]
    texts = model.answer_texts(asked, 8)
    assert texts == [model.answer_texts([question], 8)[0] for question in asked]
    assert model.answer_texts([asked[0]._replace(image=picture(0))], 8) != texts[:1]
    rows = model.first_token_probabilities(asked)
    assert rows.sum(dim=1).tolist() == pytest.approx([1, 1])
    assert "pixel_values" not in model._batch(asked)


@pytest.mark.parametrize("kind", SAVERS)
def test_choices_of_several_tokens_are_refused(kind: str, folders: dict[str, Path]) -> None:
    model = opened(folders[kind])  # its tokenizer has a token for each byte
    with pytest.raises(UserError, match=r"the choice 'True' is \d tokens"):
        model.check_choices(("True", "False"))
    with pytest.raises(UserError, match="one token for several of the choices A, A"):
        model.check_choices(("A", "A"))


def test_choices_are_taken_as_the_chat_template_writes_them(tmp_path: Path) -> None:
    model = opened(save_tiny_llava(tmp_path, before_answers=" "))
    with pytest.raises(UserError, match="the choice 'A' is 2 tokens"):  # the space is a token of its own
        model.check_choices(("A", "B"))


def test_no_weights_are_loaded_for_prompts_and_checks(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        model = opened(folder)
        assert "Where?" in model.prompt("Where?")
        model.check_choices(("A", "B"))
        assert "model" not in vars(model)


def test_image_marks_in_a_question_are_ignored(
    folders: dict[str, Path], questions: dict[str, list[Question]]
) -> None:
    marked = next(question for question in questions["ai2d"] if "<image>" in question.message)
    model = opened(folders["llava"])
    assert model.prompt(marked.message).count("<image>") == 1
    assert len(model.choice_probabilities([marked])) == 1


def test_a_model_declares_the_frame_of_its_boxes(folders: dict[str, Path], tmp_path: Path) -> None:
    assert opened(folders["localign"]).frame == ORIGINAL
    assert opened(folders["llava"]).frame is None
    assert opened(save_tiny_vlm(tmp_path / "letterbox", resize="letterbox")).frame is None
    square = BoxFrame("padded-square")
    assert {opened(folder, square).frame for folder in folders.values()} == {square}


def test_a_fingerprint_is_of_the_content(folders: dict[str, Path], tmp_path: Path) -> None:
    again = save_tiny_vlm(tmp_path / "run" / "export")
    other = save_tiny_vlm(tmp_path / "other", seed=1)
    same = fingerprint_of(str(folders["localign"]))
    assert same == fingerprint_of(str(again)) == fingerprint_of(str(tmp_path / "run"))
    assert same != fingerprint_of(str(other))
    config = again / "config.json"
    config.write_text(config.read_text().replace('"in-out"', '"vicuna"'))
    assert same != fingerprint_of(str(again))


def test_other_folders_are_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=f"{tmp_path} does not hold a model"):
        fingerprint_of(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(UserError, match="cannot load the model") as refusal:
        opened(tmp_path)
    assert "\n" not in str(refusal.value)
