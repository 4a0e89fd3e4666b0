"""Miniatures of the benchmarks' official files with all fields, and answers from a script."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from localign.vlm.data.scene_dataset import write_dataset
from localign.vlm.data.scene_questions import KINDS
from localign.vlm.scoring.base import Benchmark, QuestionSet
from localign.vlm.scoring.boxes import ORIGINAL, BoxFrame
from localign.vlm.scoring.questions import Answer, Sample


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def write_image(path: Path, size: tuple[int, int] = (8, 6)) -> None:
    """An image of width and height ``size``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 60)).save(path)


def truncate(path: Path) -> None:
    """Cut the end off an image, including pixels: without the parts after the pixels, PNG files can still be read."""
    path.write_bytes(path.read_bytes()[:-30])


# -- answers from a script -----------------------------------------------------------------------------------


def words(answers: Mapping[str, str], frame: BoxFrame | None = ORIGINAL) -> dict[str, Answer]:
    """Answers in words, by question id."""
    return {name: Answer(text=text, frame=frame) for name, text in answers.items()}


def likely(answers: Mapping[str, Sequence[float]]) -> dict[str, Answer]:
    """Probabilities of the choices, by question id."""
    return {name: Answer(probabilities=tuple(values)) for name, values in answers.items()}


def scored(benchmark: Benchmark, data: QuestionSet, script: Mapping[str, Answer]) -> list[Sample]:
    """The script's answers to all questions, scored."""
    assert {question.id for question in data.questions} == set(script)
    return [benchmark.score(question, script[question.id]) for question in data.questions]


def by_id(samples: Iterable[Sample]) -> dict[str, Sample]:
    return {sample["id"]: sample for sample in samples}


# -- files ---------------------------------------------------------------------------------------------------


def write_refcoco(root: Path) -> Path:
    """Two references of RefCOCO (three sentences), one of RefCOCO+ and one of RefCOCOg in "val", and others."""
    folder = root / "download" / "refcoco"
    write_image(folder / "train2014" / "COCO_train2014_000000000123.jpg", (200, 100))
    write_image(folder / "train2014" / "COCO_train2014_000000000456.jpg", (60, 120))
    refs = {
        "refcoco/refs(unc).p": [
            _reference(7, 42, 123, "val", {9: "left man", 10: "mañana «sign»"}),
            _reference(8, 43, 123, "val", {11: "in the corner"}),
            _reference(9, 43, 123, "testA", {12: "of another split"}),
        ],
        "refcoco+/refs(unc).p": [
            _reference(7, 44, 123, "val", {9: "the speck"}),
            _reference(1, 42, 123, "train", {1: "of another split"}),
        ],
        "refcocog/refs(umd).p": [_reference(3, 45, 456, "val", {5: "a tall thing that stands"})],
    }
    boxes: dict[int, tuple[int, list[float]]] = {
        42: (123, [20, 10, 80, 40]),
        43: (123, [120, 60, 80, 40.0000001]),  # up to the right and lower border, and slightly beyond
        44: (123, [3.2, 3.1, 0.6, 0.5]),  # too small for two decimals
        45: (456, [15, 30, 30, 60]),
    }
    for name, content in refs.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(content, protocol=2))
        write_json(path.parent / "instances.json", _instances(boxes))
    return root


def _reference(
    ref: int, annotation: int, image: int, split: str, sentences: Mapping[int, str]
) -> dict[str, Any]:
    return {
        "ref_id": ref,
        "ann_id": annotation,
        "category_id": 1,
        "image_id": image,
        "split": split,
        "file_name": f"COCO_train2014_{image:012d}_{annotation}.jpg",
        "sent_ids": list(sentences),
        "sentences": [
            {"sent_id": number, "sent": text, "tokens": text.split(), "raw": text.capitalize()}
            for number, text in sentences.items()
        ],
    }


def _instances(boxes: Mapping[int, tuple[int, list[float]]]) -> dict[str, Any]:
    return {
        "info": {},
        "licenses": [],
        "images": [
            {"id": 123, "file_name": "COCO_train2014_000000000123.jpg", "width": 200, "height": 100},
            {"id": 456, "file_name": "COCO_train2014_000000000456.jpg", "width": 60, "height": 120},
        ],
        "annotations": [
            {"id": number, "image_id": image, "bbox": box, "area": 1.0, "category_id": 1, "iscrowd": 0}
            for number, (image, box) in boxes.items()
        ],
        "categories": [{"id": 1, "name": "person", "supercategory": "person"}],
    }


def write_ocid_ref(root: Path) -> Path:
    """One expression at each end of the three degrees of clutter."""
    takes = {"12": 0, "13": 9, "14": 10, "15": 16, "16": 17, "17": 20}
    content = {
        name: {
            "scene_path": f"ARID20/floor/rgb/r{name}.png",
            "bbox": "[64, 48, 128, 96]",
            "sentence": f"the «red» box {name}",
            "take_id": take,
            "scene_id": "x",
        }
        for name, take in takes.items()
    }
    content["16"]["bbox"] = "[0, 0, 640, 480]"  # the whole image
    folder = root / "download" / "ocid-ref"
    write_json(folder / "val_expressions.json", content)
    for name in takes:
        write_image(folder / "OCID-dataset" / f"ARID20/floor/rgb/r{name}.png", (640, 480))
    return root


TALLY_ANSWERS = {"1": (0, True), "2": (1, True), "3": (1, True), "4": (15, False), "5": (2, False)}
"""By question id, the answer and whether the question is simple."""


def write_tallyqa(root: Path) -> Path:
    folder = root / "download" / "tally-qa"
    records = [
        {
            "image": f"VG_100K{'_2' if simple else ''}/{name}.jpg",
            "answer": answer,
            "data_source": "imported_genome",
            "question": f"How many things are in picture {name}?"
            if name != "5"
            else "How many cafés are there?",
            "image_id": int(name),
            "question_id": int(name),
            "issimple": simple,
        }
        for name, (answer, simple) in TALLY_ANSWERS.items()
    ]
    write_json(folder / "test.json", records)
    for record in records:
        write_image(folder / str(record["image"]))
    return root


def write_vsr(root: Path, labels: Sequence[int] = (1, 0, 1, 0)) -> Path:
    folder = root / "download" / "vsr"
    records = [
        {
            "image": f"00000000000{number}.jpg",
            "image_link": "http://images/x.jpg",
            "caption": f"The cat is left of the café {number}.",
            "label": label,
            "relation": "left of",
            "subj": "cat",
            "obj": "café",
            "annotator_id": 3,
        }
        for number, label in enumerate(labels)
    ]
    write_json_lines(folder / "test.jsonl", records)
    for record in records:
        write_image(folder / "images" / str(record["image"]))
    return root


def write_ai2d(root: Path) -> Path:
    """Image 10 of the test set with two questions, image 2 of the others with one."""
    folder = root / "download" / "ai2d"
    content = {
        "10.png": {
            "What is at the top?": _diagram("10.png-0", ["sun", "moon", "sea", "tree"], 0),
            "Which eats grass?\n": _diagram("10.png-1", ["fox", "rabbit", "owl", "<image> β"], 1),
        },
        "2.png": {"How many stages?": _diagram("2.png-0", ["1", "2", "3", "4"], 3)},
    }
    for name, questions in content.items():
        write_json(folder / "val_qa/questions" / f"{name}.json", {"imageName": name, "questions": questions})
        write_image(folder / "val_qa/images" / name)
    (folder / "ai2d_test_ids.csv").write_text("10\n11\n")
    return root


def _diagram(name: str, choices: list[str], right: int) -> dict[str, Any]:
    return {
        "abcLabel": False,
        "answerTexts": choices,
        "correctAnswer": right,
        "questionId": name,
        "imageName": name.split("-")[0],
    }


TEXTVQA_ANSWERS = {
    34602: ["nokia"] * 6 + ["Nokia!"] * 2 + ["phone", ""],
    34603: ["the 5"] * 3 + ["five"] + ["7"] * 6,
    34604: ["Zürich"] * 2 + ["unanswerable"] * 8,
}


def write_textvqa(root: Path, instruction: str = "") -> Path:
    """Three questions on two images.

    Args:
        root: The data root.
        instruction: Added to the texts with OCR tokens.
    """
    folder = root / "download" / "text-vqa"
    data = [
        {
            "question_id": number,
            "image_id": "0054c91397f2fe05" if number < 34604 else "005635e119b9f32f",
            "question": f"what is written on {number}?",
            "answers": answers,
            "question_tokens": ["what"],
            "image_classes": ["Belt"],
            "image_width": 1024,
            "image_height": 730,
            "set_name": "val",
        }
        for number, answers in TEXTVQA_ANSWERS.items()
    ]
    write_json(
        folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "dataset_version": "0.5.1", "data": data}
    )
    lines = [
        {
            "question_id": record["image_id"],
            "image": f"{record['image_id']}.jpg",
            "text": f"{record['question']}\nReference OCR token: NOKIA, 5{instruction}",
            "category": "default",
        }
        for record in data
    ]
    write_json_lines(folder / "textvqa_val_v051_ocr.jsonl", lines)
    for record in data:
        write_image(folder / "train_val_images" / f"{record['image_id']}.jpg")
    return root


VQA_ANSWERS = {
    262148000: ("other", "what is", ["left/right"] * 4 + ["up"] * 6),
    262148001: ("number", "how many", ["2"] * 2 + ["two"] * 7 + [""]),
    262148002: ("yes/no", "is the", ["yes"] * 9 + ["no"]),
    393225000: ("other", "what is", ["naïve café"] * 3 + ["cafe"] * 7),
}


def write_vqav2(root: Path) -> Path:
    folder = root / "download" / "vqa-v2"
    header = {"task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": "val2014", "license": {}}
    questions = [
        {"image_id": number // 1000, "question": f"What is {number}?", "question_id": number}
        for number in VQA_ANSWERS
    ]
    annotations = [
        {
            "question_type": question_type,
            "multiple_choice_answer": max(set(answers), key=answers.count),
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": position}
                for position, answer in enumerate(answers, start=1)
            ],
            "image_id": number // 1000,
            "answer_type": answer_type,
            "question_id": number,
        }
        for number, (answer_type, question_type, answers) in VQA_ANSWERS.items()
    ]
    write_json(folder / "v2_val2014_questions.json", header | {"questions": questions[::-1]})
    write_json(folder / "v2_val2014_annotations.json", header | {"annotations": annotations})
    for number in {number // 1000 for number in VQA_ANSWERS}:
        write_image(folder / "images_val2014" / f"COCO_val2014_{number:012d}.jpg")
    return root


VIZWIZ_ANSWERS: list[tuple[int, list[str]]] = [
    (1, ["thé au basilic"] * 4 + ["basil"] * 5 + ["unanswerable"]),
    (0, ["unanswerable"] * 9 + [""]),
    (0, ["unanswerable"] * 7 + ["unsuitable"] * 3),
    (1, ["don't know"] * 3 + ["Two"] * 5 + ["2"] * 2),
]


def write_vizwiz(root: Path, answers: Sequence[tuple[int, list[str]]] = VIZWIZ_ANSWERS) -> Path:
    folder = root / "download" / "vizwiz"
    records = [
        {
            "image": f"VizWiz_val_{number:08d}.jpg",
            "question": f"What is this, number {number}?",
            "answers": [{"answer_confidence": "maybe", "answer": text} for text in texts],
            "answer_type": "other",
            "answerable": answerable,
        }
        for number, (answerable, texts) in enumerate(answers)
    ]
    write_json(folder / "val.json", records)
    for record in records:
        write_image(folder / "val_images" / str(record["image"]))
    return root


def write_pope(root: Path, random_labels: Sequence[str] = ("yes", "no")) -> Path:
    """Two questions per split, on one image, with the same ids in every split."""
    folder = root / "download" / "pope"
    for split in ("adversarial", "popular", "random"):
        labels = random_labels if split == "random" else ("yes", "no")
        lines = [
            {
                "question_id": number,
                "image": "COCO_val2014_000000000123.jpg",
                "text": f"Is there a {'snowboard' if label == 'no' else 'piñata'} in the image, {split}?",
                "label": label,
            }
            for number, label in enumerate(labels, start=1)
        ]
        write_json_lines(folder / f"coco_pope_{split}.json", lines)
    write_image(folder / "val_images" / "COCO_val2014_000000000123.jpg")
    return root


def write_gqa(root: Path) -> Path:
    answers = {"201307251": ("yes", True), "201640614": ("t-shirt", True), "202225914": ("pizza", False)}
    content = {
        name: {
            "semantic": [{"operation": "select", "argument": "food (1)", "dependencies": []}],
            "entailed": ["202225915"],
            "equivalent": [name],
            "question": f"Is it overcast in {name if balanced else 'Łódź'}?",
            "imageId": "n578701",
            "isBalanced": balanced,
            "groups": {"global": None, "local": "10c"},
            "answer": answer,
            "semanticStr": "select: food (1)",
            "annotations": {},
            "types": {"detailed": "weatherVerify", "semantic": "global", "structural": "verify"},
            "fullAnswer": f"It is {answer}.",
        }
        for name, (answer, balanced) in answers.items()
    }
    write_json(root / "download/gqa/testdev_balanced_questions.json", content)
    write_image(root / "download/gqa/images/n578701.jpg")
    return root


def write_scenes(root: Path, scenes: int = 3, kinds: Sequence[str] = KINDS, questions: int = 8) -> Path:
    """Questions on drawn scenes of the split "test"."""
    write_dataset(root, "test", scenes, questions, kinds)
    return root


WRITERS = {
    "refcoco": write_refcoco,
    "ocid-ref": write_ocid_ref,
    "tallyqa": write_tallyqa,
    "vsr": write_vsr,
    "ai2d": write_ai2d,
    "textvqa": write_textvqa,
    "textvqa-ocr": write_textvqa,
    "vqav2": write_vqav2,
    "vizwiz": write_vizwiz,
    "pope": write_pope,
    "gqa": write_gqa,
    "scenes": write_scenes,
}
