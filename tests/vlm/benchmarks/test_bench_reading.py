"""Reading official files: questions, their order, and refusals."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest
from bench_files import (
    TALLY_ANSWERS,
    WRITERS,
    write_ai2d,
    write_gqa,
    write_json,
    write_pope,
    write_refcoco,
    write_tallyqa,
    write_textvqa,
    write_vizwiz,
    write_vqav2,
    write_vsr,
)

from localign.errors import UserError
from localign.vlm.benchmarks.table import BENCHMARKS, benchmark, benchmark_class
from localign.vlm.benchmarks.tallyqa import TallyQA
from localign.vlm.scoring.base import TOTAL, Counts
from localign.vlm.scoring.messages import LETTERS, SHORT

OFFICIAL = [name for name in BENCHMARKS if name != "scenes"]
"""The benchmarks with official files and a known number of questions."""


def messages(name: str, root: Path) -> dict[str, str]:
    return {q.id: q.message for q in benchmark(name).read(root, allow_partial=True).questions}


# -- all benchmarks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARKS)
def test_questions_are_complete_and_reproducible(name: str, tmp_path: Path) -> None:
    suite = benchmark(name)
    assert suite.name == name
    first, second = (suite.read(WRITERS[name](tmp_path / where), allow_partial=True) for where in "ab")
    assert [q.id for q in first.questions] == [q.id for q in second.questions]
    assert len({q.id for q in first.questions}) == len(first.questions)
    for question in first.questions:
        assert os.path.isfile(question.image)
        assert question.split in suite.splits
        assert question.mode == ("choices" if question.choices else "text")
        json.dumps(dict(question.payload))


@pytest.mark.parametrize("name", OFFICIAL)
def test_letters_beyond_ascii_are_read_escaped_and_unescaped(name: str, tmp_path: Path) -> None:
    root = WRITERS[name](tmp_path)
    escaped = benchmark(name).read(root, allow_partial=True).questions
    assert any(not (q.message + repr(q.payload)).isascii() for q in escaped)
    for path in (*root.rglob("*.json"), *root.rglob("*.jsonl")):
        lines = path.read_text().split("\n")
        path.write_text(
            "\n".join(json.dumps(json.loads(line), ensure_ascii=False) if line else "" for line in lines),
            encoding="utf-8",
        )
    assert benchmark(name).read(root, allow_partial=True).questions == escaped


@pytest.mark.parametrize("name", OFFICIAL)
def test_miniatures_are_refused_unless_partial_data_are_allowed(name: str, tmp_path: Path) -> None:
    root = WRITERS[name](tmp_path)
    with pytest.raises(UserError, match=f"the data of {name} are not complete") as refusal:
        benchmark(name).read(root)
    assert "\n" not in str(refusal.value)
    assert benchmark(name).read(root, allow_partial=True).deviations


@pytest.mark.parametrize("name", OFFICIAL)
def test_missing_files_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"there is no (file|folder) {tmp_path}/download/"):
        benchmark(name).read(tmp_path)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_missing_image_is_noticed(name: str, tmp_path: Path) -> None:
    root = WRITERS[name](tmp_path)
    suite = benchmark(name)
    complete = suite.read(root, allow_partial=True)
    gone = complete.questions[0].image
    os.remove(gone)
    with pytest.raises(UserError, match="their image is missing"):
        suite.read(root)
    remaining = [q.id for q in complete.questions if q.image != gone]
    if not remaining:
        with pytest.raises(UserError, match=f"no question of {name} has its image below"):
            suite.read(root, allow_partial=True)
        return
    partial = suite.read(root, allow_partial=True)
    assert [q.id for q in partial.questions] == remaining
    assert gone in partial.deviations[-1]


def test_official_counts() -> None:
    counts = {name: benchmark_class(name).expected for name in OFFICIAL}
    known = {
        "refcoco": 26488,
        "ocid-ref": 18342,
        "tallyqa": 38589,
        "vsr": 1222,
        "ai2d": 15501,
        "textvqa": 5000,
    }
    known |= {"textvqa-ocr": 5000, "vqav2": 214354, "vizwiz": 4319, "gqa": 12578}
    assert {name: numbers[TOTAL] for name, numbers in counts.items() if name != "pope"} == {
        name: (number,) for name, number in known.items()
    }
    assert counts["pope"] == {"adversarial": (3000,), "popular": (3000,), "random": (2910, 3000)}
    for numbers in counts.values():  # the splits add up to the total
        parts = [number for split, (number, *_) in numbers.items() if split != TOTAL]
        assert not parts or TOTAL not in numbers or sum(parts) == numbers[TOTAL][0]


def test_complete_data_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TallyQA, "expected", {"simple": (3,), "complex": (2,), TOTAL: (5,)})
    found = TallyQA().read(write_tallyqa(tmp_path))
    assert (len(found.questions), found.limit, found.deviations) == (5, None, ())


def test_the_number_of_images_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = benchmark("gqa")
    monkeypatch.setattr(type(suite), "expected", {TOTAL: (3,)})
    with pytest.raises(UserError, match="questions on 1 images instead of 398"):
        suite.read(write_gqa(tmp_path))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'tallyqa'"):
        benchmark("tally-qa")
    with pytest.raises(UserError, match="vsr is scored published, not 'strict'"):
        benchmark("vsr", "strict")
    with pytest.raises(UserError, match="refcoco is scored declared or published"):
        benchmark("refcoco", "strict")


# -- order and subsets ---------------------------------------------------------------------------------------


def test_the_order_is_the_published_one(tmp_path: Path) -> None:
    names = list(TALLY_ANSWERS)
    random.Random(21).shuffle(names)
    data = benchmark("tallyqa").read(write_tallyqa(tmp_path), allow_partial=True)
    assert [q.id for q in data.questions] == names


class ManyTallies(TallyQA):
    expected: ClassVar[Counts] = {"simple": (50,), "complex": (30,)}


def test_subsets_nest_and_take_as_many_of_every_split(tmp_path: Path) -> None:
    record = {"image": "VG_100K/1.jpg", "question": "How many?", "answer": 1}
    write_tallyqa(tmp_path)
    write_json(
        tmp_path / "download/tally-qa/test.json",
        [record | {"question_id": number, "issimple": number < 50} for number in range(80)],
    )
    suite = ManyTallies()
    (tmp_path / "download/tally-qa/VG_100K/1.jpg").write_bytes(b"")
    sets = [suite.read(tmp_path, limit=limit).questions for limit in (1, 7, 40)] + [
        suite.read(tmp_path).questions
    ]
    for smaller, larger in itertools.pairwise(sets):
        names = {q.id for q in smaller}
        assert [q.id for q in larger if q.id in names] == [q.id for q in smaller]
    assert [Counter(q.split for q in chosen) for chosen in sets] == [
        {"simple": n, "complex": min(n, 30)} for n in (1, 7, 40, 50)
    ]
    with pytest.raises(UserError, match="the limit of questions per split must be at least 1, not 0"):
        suite.read(tmp_path, limit=0)


def test_images_of_questions_outside_the_subset_may_be_missing(tmp_path: Path) -> None:
    suite = benchmark("tallyqa")
    root = write_tallyqa(tmp_path)
    chosen = suite.read(root, limit=1, allow_partial=True).questions
    for image in {q.image for q in suite.read(root, allow_partial=True).questions} - {
        q.image for q in chosen
    }:
        os.remove(image)
    again = suite.read(root, limit=1, allow_partial=True)
    assert again.questions == chosen
    assert not any("image" in line for line in again.deviations)


# -- messages ------------------------------------------------------------------------------------------------


def test_messages_have_the_published_words(tmp_path: Path) -> None:
    for write in (write_refcoco, write_tallyqa, write_vsr, write_ai2d, write_vizwiz, write_vqav2, write_pope):
        write(tmp_path)
    counted = "\n".join(f"{letter}. {number}" for number, letter in enumerate("ABCDEFGHIJKLMNOP"))
    letter = "Answer with the option's letter from the given choices directly."
    expected = {
        ("refcoco", "RefCOCO-7-10"): (
            "Please provide the bounding box coordinate of the region this sentence describes: "
            '"ma\u00f1ana \u00absign\u00bb"'
        ),
        ("tallyqa", "4"): f"How many things are in picture 4?\n{counted}\n{letter}",
        ("vsr", "1"): (
            'Based on the image, is this statement "True" or "False"? The cat is left of the caf\u00e9 1.\n'
            'Respond with "True" or "False" directly.'
        ),
        ("ai2d", "2-0"): f"How many stages?\nA. 1\nB. 2\nC. 3\nD. 4\n{letter}",
        ("vizwiz", "0"): (
            "What is this, number 0?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
            "Answer the question using a single word or phrase."
        ),
        ("vqav2", "262148001"): "What is 262148001?\nAnswer the question using a single word or phrase.",
        ("pope", "random-2"): (
            "Is there a snowboard in the image, random?\nAnswer the question using a single word or phrase."
        ),
    }
    for (name, question), message in expected.items():
        assert messages(name, tmp_path)[question] == message


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("tallyqa", tuple("ABCDEFGHIJKLMNOP")),
        ("ai2d", tuple("ABCD")),
        ("vsr", ("True", "False")),
        ("pope", ("Yes", "No")),
        ("gqa", ()),
        ("refcoco", ()),
    ],
)
def test_choices(name: str, choices: tuple[str, ...], tmp_path: Path) -> None:
    data = benchmark(name).read(WRITERS[name](tmp_path), allow_partial=True)
    assert {q.choices for q in data.questions} == {choices}
    assert LETTERS[25] == "Z"


def test_ai2d_compares_four_letters_whatever_the_number_of_choices(tmp_path: Path) -> None:
    root = write_ai2d(tmp_path)
    path = root / "download/ai2d/val_qa/questions/2.png.json"
    content = json.loads(path.read_text())
    (record,) = content["questions"].values()

    def of(**fields: object) -> Path:
        write_json(path, content | {"questions": {"How many?": record | fields}})
        return root

    data = benchmark("ai2d").read(of(answerTexts=["1", "2"], correctAnswer=1), allow_partial=True)
    question = next(q for q in data.questions if q.id == "2-0")
    assert question.message.startswith("How many?\nA. 1\nB. 2\nAnswer")
    assert question.choices == tuple("ABCD")
    for texts, label in (["1", "2"], 2), ([*"12345"], 4):
        problem = f"the right answer has the index {label}, but only the first {label} answers can be chosen"
        with pytest.raises(UserError, match=problem):
            benchmark("ai2d").read(of(answerTexts=texts, correctAnswer=label), allow_partial=True)
    write_json(path, content | {"questions": {}})  # an image without questions
    assert {q.id for q in benchmark("ai2d").read(root, allow_partial=True).questions} == {"10-0", "10-1"}


@pytest.mark.parametrize("instruction", ["", f"\n{SHORT}"], ids=["stripped", "with an instruction"])
def test_textvqa_has_one_instruction_with_and_without_ocr(instruction: str, tmp_path: Path) -> None:
    root = write_textvqa(tmp_path, instruction)
    assert messages("textvqa", root)["34602"] == f"what is written on 34602?\n{SHORT}"
    assert messages("textvqa-ocr", root)["34602"] == (
        f"what is written on 34602?\nReference OCR token: NOKIA, 5\n{SHORT}"
    )


def test_vqav2_joins_questions_and_annotations_by_id(tmp_path: Path) -> None:
    root = write_vqav2(tmp_path)
    found = messages("vqav2", root)
    assert all(message.startswith(f"What is {name}?") for name, message in found.items())
    path = root / "download/vqa-v2/v2_val2014_questions.json"
    content = json.loads(path.read_text())
    write_json(path, content | {"questions": content["questions"][1:]})
    with pytest.raises(UserError, match="annotates the question 393225000"):
        messages("vqav2", root)


# -- size ----------------------------------------------------------------------------------------------------

READ_AND_MEASURE = """
import resource, sys, time
from localign.vlm.benchmarks.table import benchmark
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
suite = benchmark("vqav2")
before, begin = peak(), time.process_time()
data = suite.read(sys.argv[1], allow_partial=True)
print(len(data.questions), time.process_time() - begin, peak() - before)
"""


@pytest.mark.slow
def test_200000_questions_are_read_in_little_time_and_memory(tmp_path: Path) -> None:
    root = write_vqav2(tmp_path) / "download/vqa-v2"
    answers = [["yes", "no", f"w{n % 997}", f"w{n % 7919}", "2"] * 2 for n in range(200_000)]
    questions = [{"question_id": n, "image_id": 393225, "question": f"What is {n}?"} for n in range(200_000)]
    annotations = [
        {
            "question_type": "what is",
            "multiple_choice_answer": given[0],
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": position}
                for position, answer in enumerate(given, start=1)
            ],
            "image_id": 393225,
            "answer_type": "other",
            "question_id": number,
        }
        for number, given in enumerate(answers)
    ]
    write_json(root / "v2_val2014_questions.json", {"questions": questions})
    write_json(root / "v2_val2014_annotations.json", {"annotations": annotations})
    done = subprocess.run(
        [sys.executable, "-c", READ_AND_MEASURE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    count, seconds, megabytes = map(float, done.stdout.split())
    assert count == 200_000
    assert seconds < 10  # 3 to 5 on an idle processor
    assert megabytes < 500
