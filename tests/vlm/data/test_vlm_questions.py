"""Questions about scenes: answers are right, guessing does not pay, and data sets are complete or absent."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localign.data.scenes import Scene, SceneConfig, SceneObject, SceneSource, relation
from localign.errors import UserError
from localign.vlm.data import scene_dataset
from localign.vlm.data.dialects import parse_record
from localign.vlm.data.scene_dataset import read_questions, write_dataset
from localign.vlm.data.scene_questions import KINDS, SceneQuestion, make_questions

WORLD = SceneConfig()
SOURCE = SceneSource(WORLD, "test", 500)
NUMBERS = re.compile(r"\d\.\d\d")


def ask(index: int, kinds: Sequence[str] = KINDS, count: int = len(KINDS)) -> list[SceneQuestion]:
    scene = SOURCE.scene(index)
    return make_questions(WORLD, scene, seed=0, split="test", index=index, kinds=kinds, count=count)


@pytest.fixture(scope="module")
def asked() -> list[tuple[Scene, SceneQuestion]]:
    """One question of every kind about every scene that suits the kind."""
    return [(SOURCE.scene(index), question) for index in range(500) for question in ask(index)]


def of_kind(asked: list[tuple[Scene, SceneQuestion]], kind: str) -> list[tuple[Scene, SceneQuestion]]:
    return [(scene, question) for scene, question in asked if question.kind == kind]


def named(scene: Scene, name: str) -> SceneObject:
    (item,) = [item for item in scene.objects if item.name == name]
    return item


def evenly(answers: Sequence[str], expected: int) -> bool:
    """Whether answers are uniform over ``expected`` values, within four standard deviations."""
    counts, share = Counter(answers), 1 / expected
    slack = 4 * math.sqrt(len(answers) * share * (1 - share))
    return len(counts) == expected and all(abs(n - share * len(answers)) < slack for n in counts.values())


def test_questions_are_a_function_of_seed_split_and_scene() -> None:
    assert ask(3) == ask(3)
    scene = SOURCE.scene(3)
    settings = {"seed": 0, "split": "test", "index": 3, "kinds": KINDS, "count": 8}
    for other in ({"seed": 1}, {"split": "train"}, {"index": 4}):
        assert make_questions(WORLD, scene, **{**settings, **other}) != ask(3)  # type: ignore[arg-type]


def test_fewer_questions_are_the_first_of_many() -> None:
    assert ask(5, count=3) == ask(5)[:3]


def test_every_kind_is_asked(asked: list[tuple[Scene, SceneQuestion]]) -> None:
    assert {question.kind for _, question in asked} == set(KINDS)


def test_referring_answers_are_the_objects_boxes(asked: list[tuple[Scene, SceneQuestion]]) -> None:
    for scene, question in of_kind(asked, "referring"):
        match = re.fullmatch(
            r'Please provide the bounding box coordinate of the region this sentence describes: "(.+)"',
            question.message,
        )
        assert match
        exact = np.array(named(scene, match[1]).box) / WORLD.image_size
        assert re.fullmatch(r"\[\d\.\d\d(, \d\.\d\d){3}\]", question.answer)
        written = [float(number) for number in NUMBERS.findall(question.answer)]
        assert question.box == tuple(written)
        assert np.abs(exact - written).max() <= 0.005 + 1e-9


def test_position_questions_point_at_the_middle_of_the_object(
    asked: list[tuple[Scene, SceneQuestion]],
) -> None:
    for scene, question in of_kind(asked, "position"):
        assert len(scene.objects) > 1
        point = np.array([float(number) for number in NUMBERS.findall(question.message)])
        distances = {
            o.name: np.abs(np.array(o.center) / WORLD.image_size - point).max() for o in scene.objects
        }
        assert distances[question.answer] <= 0.005 + 1e-9
        assert min(d for name, d in distances.items() if name != question.answer) > 0.05


def test_referring_questions_do_not_reveal_answers_to_position_questions() -> None:
    for index in range(100):
        turns = {question.kind: question for question in ask(index, ("referring", "position"), 2)}
        if len(turns) == 2:
            assert f'"{turns["position"].answer}"' not in turns["referring"].message


def test_counts_are_right(asked: list[tuple[Scene, SceneQuestion]]) -> None:
    for scene, question in of_kind(asked, "count"):
        match = re.match(r"How many (?:(\w+) objects|(\w+)) are there\?\n", question.message)
        assert match
        color, shape = match[1], match[2] and re.sub(r"(?<=ss)es$|s$", "", match[2])
        right = sum(color == o.color or shape == o.shape for o in scene.objects)
        assert question.answer == str(right)


def test_false_statements_say_the_opposite(asked: list[tuple[Scene, SceneQuestion]]) -> None:
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for scene, question in of_kind(asked, "relation"):
        match = re.search(r"The (\w+ \w+) is (.+) the (\w+ \w+)\.\n", question.message)
        assert match
        holds = relation(named(scene, match[1]), named(scene, match[3]))
        assert match[2] == (holds if question.answer == "True" else opposite[holds])


def test_presence_is_right_and_absent_objects_are_similar(asked: list[tuple[Scene, SceneQuestion]]) -> None:
    for scene, question in of_kind(asked, "presence"):
        match = re.match(r"Is there an? ((\w+) (\w+)) in the image\?\n", question.message)
        assert match
        present = {o.name for o in scene.objects}
        assert (match[1] in present) == (question.answer == "Yes")
        assert any(match[2] == o.color or match[3] == o.shape for o in scene.objects)


@pytest.mark.parametrize("kind", ["attribute", "choice"])
def test_attribute_questions_have_one_answer(asked: list[tuple[Scene, SceneQuestion]], kind: str) -> None:
    for scene, question in of_kind(asked, kind):
        first = question.message.split("\n")[0]
        match = re.fullmatch(r"What (?:colour is the (\w+)|shape is the (\w+) object)\?", first)
        assert match
        answers = [o.color for o in scene.objects if o.shape == match[1]]
        answers += [o.shape for o in scene.objects if o.color == match[2]]
        given = question.answer
        if kind == "choice":
            choices = dict(re.findall(r"^([A-D])\. (\w+)$", question.message, re.MULTILINE))
            assert len(set(choices.values())) == len(choices) == 4
            given = choices[given]
        assert answers == [given]


def test_a_caption_is_the_scenes_own(asked: list[tuple[Scene, SceneQuestion]]) -> None:
    for scene, question in of_kind(asked, "caption"):
        assert question.message == "Provide a short image description."
        assert question.answer.lower() == f"{scene.caption}.".lower()


@pytest.mark.parametrize(
    ("kind", "answers"), [("relation", 2), ("presence", 2), ("choice", 4), ("count", 3), ("position", 20)]
)
def test_answers_are_equally_frequent(
    asked: list[tuple[Scene, SceneQuestion]], kind: str, answers: int
) -> None:
    assert evenly([question.answer for _, question in of_kind(asked, kind)], answers)


def test_the_wording_of_a_statement_does_not_predict_its_truth(
    asked: list[tuple[Scene, SceneQuestion]],
) -> None:
    for words in ("left of", "right of", "above", "below"):
        assert evenly([q.answer for _, q in of_kind(asked, "relation") if words in q.message], 2)


def test_no_question_is_asked_twice_and_kinds_end() -> None:
    for index in range(50):
        messages = [question.message for question in ask(index, KINDS, 80)]
        assert len(set(messages)) == len(messages)
        assert len(ask(index, ("referring",), 9)) == len(SOURCE.scene(index).objects)


def test_a_kind_named_twice_comes_twice_as_often() -> None:
    found = Counter(q.kind for i in range(60) for q in ask(i, ("presence", "presence", "caption"), 3))
    assert found["caption"] == 60
    assert 100 < found["presence"] <= 120  # a scene of one object has no second "Yes"


def test_other_worlds_have_questions_too() -> None:
    world = SceneConfig(shapes=("ring", "hourglass"), colors=("orange", "white"), max_objects=2)
    source = SceneSource(world, "test", 40)
    found = [
        q
        for i in range(40)
        for q in make_questions(world, source.scene(i), seed=0, split="test", index=i, kinds=KINDS, count=8)
    ]
    assert {question.kind for question in found} == set(KINDS)
    assert any("an orange" in question.message for question in found)
    assert {len(re.findall(r"^[A-D]\.", q.message, re.MULTILINE)) for q in found if q.kind == "choice"} == {2}


# -- data sets on disk ---------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_data_set_is_in_llavas_form(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "set", "test", 12, 4)
    records = json.loads(path.read_text())
    for record in records:
        parsed = parse_record(record)
        assert not parsed.unanswered
        index = int(record["id"].removeprefix("test-"))
        with Image.open(path.parent / record["image"]) as image:
            np.testing.assert_array_equal(np.asarray(image), SOURCE.scene(index).image)
        first, *others = [question for question, _ in parsed.record.turns]
        assert first.startswith("<image>\n")
        assert not any("<image>" in question for question in others)
        assert len(record["kinds"]) == len(record["boxes"]) == len(parsed.record.turns)


def test_questions_are_read_back_one_by_one(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, "test", 12, 4)
    found = read_questions(path)
    assert [one.question for one in found] == [q for index in range(12) for q in ask(index, KINDS, 4)]
    assert len({one.id for one in found}) == len(found)
    assert all(one.image.is_file() for one in found)


def test_scenes_that_no_kind_suits_have_no_record(tmp_path: Path) -> None:
    found = read_questions(write_dataset(tmp_path, "test", 40, 1, ("relation",)))
    several = sum(len(SOURCE.scene(index).objects) > 1 for index in range(40))
    assert len(found) == len(list((tmp_path / "images").iterdir())) == several < 40


def test_a_complete_data_set_is_left_alone(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, "val", 5, 2, seed=7)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert write_dataset(tmp_path, "val", 5, 2, seed=7) == path
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == times


def test_a_data_set_does_not_depend_on_the_processes_that_draw_it(tmp_path: Path) -> None:
    write_dataset(tmp_path / "one", "train", 300, 1, ("presence",))
    write_dataset(tmp_path / "two", "train", 300, 1, ("presence",), processes=2)
    assert len(list((tmp_path / "one").rglob("*.png"))) > 256
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_an_interrupted_data_set_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "whole", "train", 8, 2)
    write = scene_dataset._write_image
    written: list[Path] = []

    def stop_at_the_fifth(path: Path, scene: Scene) -> None:
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(path)
        write(path, scene)

    folder = tmp_path / "cut"
    monkeypatch.setattr(scene_dataset, "_write_image", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(folder, "train", 8, 2)
    assert not (folder / "questions.json").exists()
    written[0].write_bytes(b"half a picture")
    monkeypatch.setattr(scene_dataset, "_write_image", write)
    write_dataset(folder, "train", 8, 2)
    assert content(folder) == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"split": "train"}, "split: 'test' there, 'train' now"),
        ({"scenes": 4}, "scenes: 3 there, 4 now"),
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"world": replace(WORLD, noise=0)}, "world: .*'noise': 24.* there, .*'noise': 0.* now"),
    ],
)
def test_a_folder_with_other_settings_is_refused(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    arguments = {"split": "test", "scenes": 3, "questions_per_scene": 2}
    write_dataset(tmp_path, **arguments)  # type: ignore[arg-type]
    before = content(tmp_path)
    with pytest.raises(UserError, match=words):
        write_dataset(tmp_path, **{**arguments, **change})  # type: ignore[arg-type]
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tests", 3, 2), "no split 'tests'"),
        (("test", 0, 2), "needs scenes, not 0"),
        (("test", 3, 0), "needs questions per scene, not 0"),
        (("test", 3, 2, ()), "needs kinds"),
        (("test", 3, 2, ("refering",)), "'refering'.*did you mean 'referring'"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_written(
    tmp_path: Path, arguments: tuple[object, ...], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        write_dataset(tmp_path / "set", *arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "set").exists()


def test_files_that_hold_no_questions_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file of questions .*absent\.json"):
        read_questions(tmp_path / "absent.json")
    plain = tmp_path / "llava.json"
    plain.write_text('[{"id": "1", "image": "a.png", "conversations": []}]')
    with pytest.raises(UserError, match=r"llava\.json is no file of questions about scenes"):
        read_questions(plain)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "questions.json").write_text("[]")
    with pytest.raises(UserError, match=r"questions but no settings\.json"):
        write_dataset(foreign, "test", 3, 2)
