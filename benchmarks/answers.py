"""Reading VQAv2's files and scoring answers, against a plain script that parses all JSON and normalises every answer.

The files are synthetic. They have the layout and the size of the official files, with ten annotators' answers to each
question, most of which agree.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.table import Table

from benchmarks.config import AnswersConfig
from localign import rng
from localign.bench.show import both_times, show, timing_table, write_measurements
from localign.bench.timing import Timing, hardware, timed
from localign.errors import RunFailure
from localign.vlm.benchmarks.table import benchmark
from localign.vlm.scoring.normalisation import VQAV2
from localign.vlm.scoring.questions import Answer

QUESTIONS, PER_IMAGE = 214_354, 5.292
"""Number of questions, and questions per image, of the official validation files."""
VOCABULARY = 20_000
OURS, PLAIN = "localign", "plain"
CPU = torch.device("cpu")
_FOLDER = Path("download") / "vqa-v2"
_NAMES = ("v2_val2014_questions.json", "v2_val2014_annotations.json")


def run_bench_answers(config: AnswersConfig) -> None:
    """Run the benchmark, write its JSON file, and print its tables."""
    content = write_measurements(config, bench_answers(config))
    show(answers_tables(content), config)


def bench_answers(config: AnswersConfig) -> dict[str, Any]:
    """Draw the files, and measure each implementation in its own process.

    Raises:
        RunFailure: The implementations disagree about a score.
    """
    count = config.questions or QUESTIONS
    with TemporaryDirectory() as folder:
        predictions = write_files(Path(folder), count, config.seed)
        (Path(folder) / "predictions.json").write_text(json.dumps(predictions), encoding="utf-8")
        ways = []
        for way in (OURS, PLAIN):
            runs = [_in_own_process(way, folder) for _ in range(config.repeats or 1)]
            ways.append(_best(way, runs))
    check_equal(*(way.pop("scores") for way in ways))
    return {"questions": count, "hardware": hardware(CPU) | {"threads": 1}, "ways": ways}


def _best(way: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "way": way,
        "scores": runs[0]["scores"],
        "peak_bytes": runs[0]["peak_bytes"],
        **{part: asdict(Timing.best([run[part] for run in runs])) for part in ("loading", "scoring")},
    }


def check_equal(first: dict[str, float], second: dict[str, float]) -> None:
    """Raises RunFailure if the scores differ."""
    if first != second:
        different = next(name for name in first if first[name] != second.get(name))
        raise RunFailure(f"the implementations disagree about the score of question {different}")


# -- files ---------------------------------------------------------------------------------------------------


def write_files(root: Path, count: int, seed: int) -> dict[str, str]:
    """Write questions, annotations and empty image files below a data root.

    Returns:
        Question id -> predicted answer.
    """
    draw = rng.generator(seed, "bench answers")
    words = _vocabulary(draw)
    frequent = 1 / np.arange(1, len(words) + 1)
    # Three candidate answers per question, given by about seven, two and one of the ten annotators.
    candidates = draw.choice(len(words), (count, 3), p=frequent / frequent.sum())
    given = draw.choice(3, (count, 10), p=(0.7, 0.2, 0.1))
    images = (np.arange(count) / PER_IMAGE).astype(int)
    questions, annotations, predictions = [], [], {}
    for i in range(count):
        answers = [words[candidates[i, k]] for k in given[i]]
        common = {"image_id": int(images[i]), "question_id": i}
        questions.append(common | {"question": f"What is the thing number {i} in the picture?"})
        annotations.append(
            common
            | {
                "question_type": f"what is {i % 65}",
                "answer_type": ("yes/no", "number", "other")[i % 3],
                "multiple_choice_answer": answers[0],
                "answers": [
                    {"answer": answer, "answer_confidence": "yes", "answer_id": k + 1}
                    for k, answer in enumerate(answers)
                ],
            }
        )
        predictions[str(i)] = _as_model_output(answers[int(draw.integers(10))], i)
    folder = root / _FOLDER
    (folder / "images_val2014").mkdir(parents=True)
    for name, part in zip(_NAMES, ({"questions": questions}, {"annotations": annotations}), strict=True):
        (folder / name).write_text(json.dumps(part), encoding="utf-8")
    for image in range(int(images[-1]) + 1):
        (folder / "images_val2014" / f"COCO_val2014_{image:012d}.jpg").touch()
    return predictions


def _vocabulary(draw: np.random.Generator) -> list[str]:
    """The most common answers, then random words, some of them pairs of words."""
    words = ["yes", "no", "2", "white", "1", "3", "0", "black", "t-shirt", "don't know", "10:30", "1,000"]
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    while len(words) < VOCABULARY:
        word = "".join(draw.choice(letters, int(draw.integers(3, 10))))
        words.append(f"{word} {words[-1]}"[:20] if len(words) % 4 == 0 else word)
    return words


def _as_model_output(answer: str, number: int) -> str:
    """The answer in one of several forms in which a model may write it."""
    return (answer, answer.capitalize(), f"{answer}.", f"the {answer}")[number % 4]


# -- implementations -----------------------------------------------------------------------------------------


def _in_own_process(way: str, root: str) -> dict[str, Any]:
    """Measure in a fresh process, so that the peak memory is that of the implementation."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured, way, root).result()


def measured(way: str, root: str) -> dict[str, Any]:
    """Times of loading and scoring, peak memory of loading in bytes, and the scores by question."""
    torch.set_num_threads(1)
    predictions = json.loads((Path(root) / "predictions.json").read_text(encoding="utf-8"))
    load, score = _WAYS[way]
    before = _memory("VmRSS")
    content, loading = timed(functools.partial(load, Path(root)), CPU)
    peak = _memory("VmHWM")
    scores, scoring = timed(functools.partial(score, content, predictions), CPU)
    growth = None if peak is None or before is None else peak - before
    return {"loading": loading, "scoring": scoring, "peak_bytes": growth, "scores": scores}


def _memory(field: str) -> int | None:
    """A memory figure of this process in bytes; None if the system has no /proc."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(field)), None)


def _load(root: Path) -> Any:
    return benchmark("vqav2").read(root, allow_partial=True).questions


def _score(questions: Any, predictions: dict[str, str]) -> dict[str, float]:
    suite = benchmark("vqav2")
    samples = [suite.score(question, Answer(text=predictions[question.id])) for question in questions]
    suite.aggregate(samples)
    return {sample["id"]: sample["score"] for sample in samples}


def _load_plainly(root: Path) -> Any:
    return [json.loads((root / _FOLDER / name).read_text(encoding="utf-8")) for name in _NAMES]


def _score_plainly(content: Any, predictions: dict[str, str]) -> dict[str, float]:
    """Score by leaving out each annotator in turn, and normalise every answer again."""
    truth: Callable[[str], str] = getattr(VQAV2.truth, "__wrapped__", VQAV2.truth)
    scores = {}
    for annotation in content[1]["annotations"]:
        name = str(annotation["question_id"])
        prediction = VQAV2.prediction(predictions[name])
        answers = [truth(answer["answer"]) for answer in annotation["answers"]]
        shares = []
        for left_out in range(len(answers)):
            others = [answer for k, answer in enumerate(answers) if k != left_out]
            shares.append(min(1.0, sum(answer == prediction for answer in others) / 3))
        scores[name] = sum(shares) / len(shares)
    return scores


_WAYS: dict[str, tuple[Callable[..., Any], Callable[..., dict[str, float]]]] = {
    OURS: (_load, _score),
    PLAIN: (_load_plainly, _score_plainly),
}


def answers_tables(content: dict[str, Any]) -> list[Table]:
    """A table of the time and memory to read the files, and of the time to score an answer to every question."""
    title = "{questions:,} questions of VQAv2, ten annotators each".format(**content)
    numbers = ("loading, s", "peak memory, MB", "scoring, s")
    table = timing_table(title, content, ("way",), numbers)
    for row in content["ways"]:
        peak = row["peak_bytes"]
        loading, scoring = (both_times(row[part], ".1f", wall_only=False) for part in ("loading", "scoring"))
        table.add_row(row["way"], loading, "–" if peak is None else f"{peak / 1e6:,.0f}", scoring)
    return [table]
