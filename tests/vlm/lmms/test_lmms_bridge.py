"""Our models and benchmarks through lmms-eval: the metrics equal our own engine's."""

from __future__ import annotations

import json
import shlex
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_files import WRITERS
from bench_models import CPU, ScriptedModel, save_tiny_llava, save_tiny_vlm
from PIL import ImageFile

from localign.cli import main
from localign.engine.distributed import DistributedContext
from localign.errors import UserError
from localign.options.vlm.evaluation import IN_LMMS_EVAL
from localign.vlm.evaluation.generation import Query
from localign.vlm.evaluation.models import open_model
from localign.vlm.evaluation.results import read_answers
from localign.vlm.scoring.questions import Question

# The package needs ninety others, so the extra "dev" does not contain it.
lmms_eval = pytest.importorskip("lmms_eval.evaluator", reason="needs the extra localign[lmms-eval]")
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Refuse network access, and give the test its own caches."""

    def refuse(*_: Any) -> None:
        raise OSError("there is no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    tolerant = ImageFile.LOAD_TRUNCATED_IMAGES
    yield
    ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name in IN_LMMS_EVAL:
        WRITERS[name](root)
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_tiny_vlm(root / "localign", words=("True", "False"))
    save_tiny_llava(root / "llava")
    return root


def evaluated(command: str, out: Path) -> dict[str, Any]:
    """The results of a command."""
    assert main(shlex.split(f"vlm eval {command} --device cpu --out {out}")) == 0
    content: dict[str, Any] = json.loads((out / "results.json").read_text())
    return content


def own_samples(out: Path, name: str) -> list[dict[str, Any]]:
    """lmms-eval's log of a task's answers, in the order of the documents."""
    (path,) = (out / "lmms-eval" / name).rglob(f"*_samples_{name}.jsonl")
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])


def one_word_tasks(folder: Path) -> None:
    """Write lmms-eval's own POPE on local data, and a multiple-choice task that lmms-eval scores."""
    from datasets import Dataset, Image
    from vlm_models import picture

    rows = [
        {"question_id": str(n), "question": f"Is there a {thing}?", "answer": answer, "image": picture(n)}
        for n, (thing, answer) in enumerate([("cat", "yes"), ("green dog", "no"), ("kite", "yes")])
    ]
    folder.mkdir()
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(str(folder / "pope.parquet"))
    own = Path(lmms_eval.__file__).parent / "tasks" / "pope" / "pope.yaml"
    local = "dataset_path: parquet\ndataset_kwargs:\n  data_files:\n    test: pope.parquet\n"
    (folder / "pope.yaml").write_text(f"include: {own}\ntask: pope_here\n{local}")
    (folder / "letter.yaml").write_text(
        f"task: letter_here\n{local}test_split: test\noutput_type: multiple_choice\ndoc_to_visual: image\n"
        'doc_to_text: question\ndoc_to_choice: ["A", "B", "C"]\ndoc_to_target: "B"\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )


# -- our benchmarks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("localign", "--benchmarks tallyqa,vsr,ocid-ref"),
        ("localign", "--benchmarks ocid-ref,tallyqa --limit 1 --scoring published"),
        ("llava", "--benchmarks tallyqa,ocid-ref --boxes original:0-1000"),
    ],
)
def test_metrics_and_answers_equal_our_own_engine(
    model: str, options: str, data: Path, models: Path, tmp_path: Path
) -> None:
    command = f"{models / model} {options} --data {data} --allow-partial --batch-size 2"
    own = evaluated(command, tmp_path / "own")
    theirs = evaluated(f"{command} --engine lmms-eval", tmp_path / "theirs")
    assert theirs["engine"] == "lmms-eval"
    assert theirs["model"] == own["model"]
    assert list(theirs["benchmarks"]) == list(own["benchmarks"])
    for name, outcome in own["benchmarks"].items():
        figures = theirs["benchmarks"][name].pop("figures")
        for figure, expected in outcome.pop("figures").items():
            assert figures.pop(figure) == {
                "value": pytest.approx(expected["value"]),
                "interval": pytest.approx(expected["interval"]),
            }
        assert figures == {}
        assert theirs["benchmarks"][name] == outcome
    answers = [read_answers(tmp_path / engine / "answers.jsonl") for engine in ("own", "theirs")]
    for name, records in answers[0].items():
        for a, b in zip(records, answers[1][name], strict=True):
            apart = {"answer", "probabilities"} if a["choices"] else set()
            for key in apart:
                assert dict(b)[key] == pytest.approx(dict(a)[key], rel=1e-9)
            assert {k: v for k, v in a.items() if k not in apart} == {
                k: v for k, v in b.items() if k not in apart
            }
    assert len({record["answer"] for record in answers[0]["ocid-ref"]}) > 1


class HashedModel(ScriptedModel):
    """Answers from hashes, through the methods that the bridge calls."""

    def answer_texts(self, questions: Sequence[Any], max_new_tokens: int) -> list[str]:
        boxes = ["[0.1, 0.1, 0.2, 0.2]", "[0.1, 0.1, 0.2, 0.3]", "nowhere", "[0, 0, 1, 1]"]
        return [boxes[int(4 * self.share(question, 0))] for question in questions]

    def first_token_probabilities(self, questions: Sequence[Any]) -> torch.Tensor:
        shares = [[self.share(question, n) for n in range(128)] for question in questions]
        return torch.tensor(shares, dtype=torch.float64) / 128

    def token(self, choice: str) -> int:
        return ord(choice[0])

    def share(self, question: Any, number: int) -> float:
        asked = Question(str(number), "", question.message, "", {})
        return self._numbers(asked, 1)[0]


def test_right_and_wrong_answers_are_averaged_as_in_our_own_engine(data: Path) -> None:
    from lmms_eval.tasks import TaskManager

    from localign.vlm.lmms.model import LocalignLMM
    from localign.vlm.lmms.registration import TASK_FOLDER

    model = HashedModel()
    manager = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False)
    for name in IN_LMMS_EVAL:
        options = {"root": str(data), "allow_partial": True, "boxes": "original:0-1"}
        task = manager.load_config({"task": name, "dataset_kwargs": options})[name]
        output = lmms_eval.simple_evaluate(model=LocalignLMM(model, 3), tasks=[task], task_manager=manager)
        samples = []
        for question in task.data.questions:
            given: list[Any] = list(model.answer_texts([question], 1))
            if question.choices:
                row = model.first_token_probabilities([question])[0]
                given = [(-float(row[model.token(c)].log()), False) for c in question.choices]
            answer = task.answer(task.data.questions.index(question), given)
            samples.append(task.suite.score(question, answer))
        expected = task.suite.aggregate(samples)
        assert {f: output["results"][name][f"{f},none"] for f in expected} == pytest.approx(expected)
        assert len({sample["score"] for sample in samples}) > 1 or name == "tallyqa"


def test_answers_can_be_rescored(data: Path, models: Path, tmp_path: Path) -> None:
    command = f"{models / 'localign'} --benchmarks vsr,ocid-ref --data {data} --allow-partial"
    before = evaluated(f"{command} --engine lmms-eval", tmp_path)
    assert main(["vlm", "score", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "results.json").read_text()) == before


def test_lmms_eval_finds_model_and_tasks_by_name(
    data: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lmms-eval's own command line uses the entry point's manifest, ``--model_args`` and ``--include_path``."""
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    from localign.vlm.lmms.plugin import manifest
    from localign.vlm.lmms.registration import TASK_FOLDER
    from localign.vlm.lmms.task import ROOT_VARIABLE

    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    manager = TaskManager(include_path=str(TASK_FOLDER), model_name="localign")
    arguments = {
        "model": "localign",
        "model_args": f"pretrained={models / 'localign'},dtype=float32",
        "device": "cpu",
        "batch_size": 2,
        "task_manager": manager,
    }
    with pytest.raises(UserError, match="set LOCALIGN_DATA to the data root"):
        lmms_eval.simple_evaluate(tasks=["vsr"], **arguments)
    monkeypatch.setenv(ROOT_VARIABLE, str(data))
    with pytest.raises(UserError, match="the data of vsr are not complete"):
        lmms_eval.simple_evaluate(tasks=["vsr"], **arguments)
    partly = {"task": "vsr", "dataset_kwargs": {"allow_partial": True}}
    output = lmms_eval.simple_evaluate(tasks=[partly], **arguments)
    assert len(output["samples"]["vsr"]) == 4
    with pytest.raises(UserError, match="pretrained=NAME"):
        lmms_eval.simple_evaluate(tasks=["vsr"], **(arguments | {"model_args": "pretrained=x,depth=3"}))


# -- lmms-eval's own tasks -----------------------------------------------------------------------------------


def test_its_own_tasks_run_on_local_data(models: Path, tmp_path: Path) -> None:
    from vlm_models import picture

    one_word_tasks(tmp_path / "tasks")
    results = evaluated(
        f"{models / 'localign'} --engine lmms-eval --benchmarks pope_here,letter_here "
        f"--task-folders {tmp_path / 'tasks'} --batch-size 2",
        tmp_path / "out",
    )
    assert results["benchmarks"] == {}
    model = open_model(str(models / "localign"), "x", CPU, torch.float32)

    words = [f"Is there a {thing}?" for thing in ("cat", "green dog", "kite")]
    short = "\nAnswer the question using a single word or phrase."
    asked = [Query(text + short, picture(n)) for n, text in enumerate(words)]
    texts = [model.answer_texts([one], 128)[0].split("\n\n")[0].strip() for one in asked]
    samples = own_samples(tmp_path / "out", "pope_here")
    assert [sample["filtered_resps"] for sample in samples] == texts
    assert len(set(texts)) > 1
    assert results["tasks"]["pope_here"]["pope_yes_ratio,none"] == pytest.approx(2 / 3)

    rows = [model.first_token_probabilities([Query(text, picture(n))])[0] for n, text in enumerate(words)]
    shares = torch.stack(rows)[:, [model.token(letter) for letter in "ABC"]]
    right = (shares.argmax(dim=1) == 1).double().mean()
    assert results["tasks"]["letter_here"]["acc,none"] == pytest.approx(float(right))
    losses = [
        float(pair[0])
        for sample in own_samples(tmp_path / "out", "letter_here")
        for pair in sample["filtered_resps"]
    ]
    assert losses == pytest.approx((-shares.log()).flatten().tolist(), rel=1e-4)


def test_its_own_scores_are_kept(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one_word_tasks(tmp_path / "tasks")
    monkeypatch.setattr(
        "localign.vlm.evaluation.localign_model.LocalignModel.answer_texts",
        lambda self, asked, most: ["Yes"] * len(asked),
    )
    command = (
        f"{models / 'localign'} --engine lmms-eval --benchmarks pope_here --task-folders {tmp_path / 'tasks'}"
    )
    figures = evaluated(command, tmp_path / "out")["tasks"]["pope_here"]
    assert figures["pope_accuracy,none"] == pytest.approx(2 / 3)
    assert figures["pope_recall,none"] == 1
    assert "pope_accuracy" in capsys.readouterr().out
    figures = evaluated(f"{command} --limit 1", tmp_path / "less")["tasks"]["pope_here"]
    assert figures["pope_accuracy,none"] == 1


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--benchmarks pop", "lmms-eval has no task 'pop'"),
        ("--benchmarks refcoco_no_such", "lmms-eval has no task"),
        ("--benchmarks pope --task-folders nowhere", "there is no folder nowhere"),
        ("--benchmarks pope --limit 0", "--limit must be at least 1"),
        ("--benchmarks vsr --data DATA", "the data of vsr are not complete"),
        ("--benchmarks vsr --data DATA --allow-partial --boxes x", "'x' is not a box frame"),
        (
            "LLAVA --benchmarks ocid-ref --data DATA --allow-partial",
            "does not declare the frame of its boxes",
        ),
        ("LLAVA --benchmarks vsr --data DATA --allow-partial", "the choice 'True' is 4 tokens"),
    ],
)
def test_bad_use_is_one_line(
    options: str, said: str, data: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = options if "LLAVA" in options else f"{models / 'localign'} {options}"
    for name, path in (("LLAVA", models / "llava"), ("DATA", data)):
        options = options.replace(name, str(path))
    command = f"vlm eval {options} --engine lmms-eval --device cpu --out {tmp_path / 'out'}"
    assert main(shlex.split(command)) == 2
    line = capsys.readouterr().err.strip()
    assert said in line
    assert "\n" not in line
    assert not (tmp_path / "out").exists()


def test_a_filelock_that_lmms_eval_cannot_use_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "filelock._api", None)  # as in version 4
    command = f"vlm eval m --engine lmms-eval --benchmarks pope --out {tmp_path}"
    assert main(shlex.split(command)) == 2
    line = capsys.readouterr().err.strip()
    assert "filelock._api" in line
    assert "install localign[lmms-eval]" in line
    assert "\n" not in line


def test_several_processes_are_refused(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def two(device: str) -> Iterator[DistributedContext]:
        yield DistributedContext(0, 2, 0, CPU)

    monkeypatch.setattr("localign.vlm.lmms.run.distributed_context", two)
    command = f"vlm eval {models / 'localign'} --engine lmms-eval --benchmarks pope --out {tmp_path}"
    assert main(shlex.split(command)) == 2
    assert "runs in one process" in capsys.readouterr().err


def request(text: str, settings: dict[str, Any], images: int = 1) -> Any:
    """A request of lmms-eval on a document that is its own number of images."""
    from lmms_eval.api.instance import Instance
    from vlm_models import picture

    metadata = {"task": "some_task", "doc_id": images, "repeats": 1}
    visual = lambda document: [picture(n) for n in range(document)]  # noqa: E731
    return Instance("generate_until", (text, settings, visual, images, "some_task", "test"), 0, metadata)


def test_answers_end_at_the_tasks_end_strings(models: Path) -> None:
    from localign.vlm.lmms.model import LocalignLMM

    model = LocalignLMM(open_model(str(models / "localign"), "x", CPU, torch.float32), 2)
    model.task_dict = {"some_task": {"test": [0, 1, 2]}}
    (whole,) = model.generate_until([request("What?", {"max_new_tokens": 30, "until": []})])
    middle = whole[len(whole) // 2]
    short, plain, without, first = model.generate_until(
        [
            request("What?", {"max_new_tokens": 30, "until": ["", middle]}),
            request("What?", {"max_new_tokens": 30, "temperature": 0, "do_sample": True}),
            request("What?", {"max_new_tokens": 30}, images=0),
            request("What?", {"max_new_tokens": 3}),
        ]
    )
    assert short == whole.split(middle)[0].strip()
    assert plain == whole
    assert without not in ("", whole)
    assert whole.startswith(first[:1])
    assert len(first) <= 3


@pytest.mark.parametrize(
    ("settings", "images", "said"),
    [
        ({"do_sample": True}, 1, "some_task asks for sampling or beams"),
        ({"do_sample": True, "temperature": 0.7}, 1, "some_task asks for sampling or beams"),
        ({"num_beams": 3}, 1, "some_task asks for sampling or beams"),
        ({}, 2, "some_task asks about 2 images at once"),
    ],
)
def test_unsupported_requests_are_refused(
    settings: dict[str, Any], images: int, said: str, models: Path
) -> None:
    from localign.vlm.lmms.model import LocalignLMM

    model = LocalignLMM(open_model(str(models / "localign"), "x", CPU, torch.float32))
    model.task_dict = {"some_task": {"test": [0, 1, 2]}}
    with pytest.raises(UserError, match=said):
        model.generate_until([request("What?", settings, images)])
    with pytest.raises(UserError, match="has several rounds"):
        model.generate_until_multi_round([request("What?", {})])
