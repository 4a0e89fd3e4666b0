"""localign still loads, resumes, exports, scores and reports the files that localign 0.1.0 wrote.

``make_fixtures.py`` made the files and documents the commands. Each test works on a copy of all files, in the folder
that the paths in the files are relative to.
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import localign
from localign.cli import main
from localign.finetuning import load_classifier

OLD = Path(__file__).parent / "v0.1.0"
EXPECTED: dict[str, Any] = json.loads((OLD / "expected.json").read_text())
ATOL = 1e-5
"""Allows for rounding on other processors. Without the optimizer's state, weights would differ by about the learning
rate, 1e-3."""


@pytest.fixture(autouse=True)
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of all files, which is the working directory. Shards keep the modification time that their index names."""
    folder = tmp_path / "old"
    shutil.copytree(OLD, folder)
    for name, time in EXPECTED["shard_mtimes"].items():
        os.utime(folder / "shards" / name, ns=(time, time))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield folder
    torch.set_num_threads(threads)


def run(command: str, code: int = 0) -> None:
    """Run `localign COMMAND` and check its exit code."""
    assert main(shlex.split(command)) == code


def content(path: str | Path) -> Any:
    return json.loads(Path(path).read_text())


def files(folder: str | Path) -> dict[str, bytes]:
    """The content of all files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def logged(folder: str, field: str) -> dict[int, Any]:
    entries = map(json.loads, Path(folder, "log.jsonl").read_text().splitlines())
    return {entry["step"]: entry[field] for entry in entries if field in entry}


def split(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A vision-language model's weights under the names of now: the base model, and its output layer beside it."""
    names = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
    names |= {"vision.": "model.vision.", "adapter.": "model.adapter."}
    if not any(name.startswith("language_model.") for name in state):
        return state
    old = {name: next(old for old in names if name.startswith(old)) for name in state}
    return {names[old[name]] + name.removeprefix(old[name]): tensor for name, tensor in state.items()}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], atol: float = ATOL) -> None:
    theirs = split(theirs)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=atol)


def assert_same_export(ours: str | Path, theirs: str | Path, atol: float = ATOL) -> None:
    """The same weights in the same files."""
    names = {path.name for path in Path(theirs).glob("*.safetensors")}
    assert names
    assert {path.name for path in Path(ours).glob("*.safetensors")} == names
    for name in names:
        assert_close(load_file(Path(ours) / name), load_file(Path(theirs) / name), atol)


def picture() -> Image.Image:
    return Image.open(EXPECTED["picture"]).convert("RGB").resize((24, 24))


# -- runs that were stopped ------------------------------------------------------------------------------

FINETUNE = (
    "finetune --steps 14 --batch-size 4 --lr 1e-3 --eps 1e-5 --workers 0 --device cpu --log-every 1 "
    "--backbone align-finished --data shards --val photos --label-smoothing 0.2 --optimizer muon "
    "--max-bad-share 0.2 --warmup-steps 3 --keep-checkpoints 1"
)
PRETRAIN = (
    "pretrain --steps 14 --batch-size 4 --lr 1e-3 --eps 1e-5 --workers 0 --device cpu --log-every 1 "
    "--scenes 24 --val-scenes 8 --width 8 --depth 1 --num-heads 2 --patch-size 8 --warmup-steps 3 "
    "--keep-checkpoints 1"
)


CLIPSELF = (
    "align --steps 14 --batch-size 4 --lr 1e-3 --eps 1e-5 --workers 0 --device cpu --log-every 1 "
    "--objective clipself --backbone start --data photos --scale-images 6 --train-blocks 1 --max-bad-share 0.2 "
    "--keep-checkpoints 1"
)


def as_options(file: str) -> str:
    """The options of a config file in the form of a command line."""
    words = []
    for name, value in yaml.safe_load(Path(OLD, file).read_text()).items():
        if name == "base":
            words.append(f"--config {value}")
            continue
        if isinstance(value, dict):
            value = [f"{key}={inner}" for key, inner in value.items()]
        values = value if isinstance(value, list) else ["null" if value is None else value]
        words.append(f"--{name.replace('_', '-')} {' '.join(map(str, values))}")
    return " ".join(words)


STOPPED = {
    "align": ("align", "align --config align.yaml"),
    "align by options": ("align", f"align {as_options('align.yaml')}"),
    "clipself": ("clipself", CLIPSELF),
    "finetune": ("finetune", FINETUNE),
    "pretrain": ("pretrain", PRETRAIN),
    "vlm": ("vlm", "vlm train --config vlm.yaml"),
    "vlm by options": ("vlm", f"vlm train {as_options('vlm.yaml')}"),
    "vlm-sharded": ("vlm-sharded", "vlm train --config vlm.yaml --sharding full"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", STOPPED)
def test_a_stopped_run_ends_as_it_would_have(case: str) -> None:
    name, command = STOPPED[case]
    expected, whole = EXPECTED["runs"][name], f"{name.removesuffix('-sharded')}-finished"
    assert 0 < expected["stopped_at"] < 14
    crop = " --crop rkrc" if name in ("align", "clipself") else ""
    run(f"{command} --out {name}-stopped --resume{crop}")
    results = content(f"{name}-stopped/results.json")
    assert results["samples_digest"] == expected["digest"]
    assert list(results["skipped_images"]["images"]) == expected["skipped_images"]
    assert results["final"] == pytest.approx(expected["final"], abs=ATOL)
    assert_same_export(f"{name}-stopped/export", f"{whole}/export")
    assert logged(f"{name}-stopped", "samples") == logged(whole, "samples")
    for field in ("lr", "loss", "grad_norm"):
        assert logged(f"{name}-stopped", field) == pytest.approx(logged(whole, field), rel=1e-4)
    (state,) = Path(f"{name}-stopped").glob("checkpoints/step-0000014/state.json")
    assert content(state)["fingerprint"] == expected["fingerprint"]


def test_data_may_have_moved(old: Path) -> None:
    (old / "elsewhere").mkdir()
    for name in ("photos", "shards"):
        (old / name).rename(old / "elsewhere" / name)
    moved = "--data elsewhere/shards --val elsewhere/photos"
    run(f"{FINETUNE} {moved} --out finetune-stopped --resume auto")
    digest = content("finetune-stopped/results.json")["samples_digest"]
    assert digest == EXPECTED["runs"]["finetune"]["digest"]
    assert_same_export("finetune-stopped/export", "finetune-finished/export")


@pytest.mark.parametrize("name", ["align", "clipself"])
def test_a_run_with_the_narrow_crop_says_how_it_goes_on(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(f"{name}-stopped")
    run(f"{STOPPED[name][1]} --out {name}-stopped --resume", code=2)
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "crop: 'rkrc' before" in line
    assert "add --crop rkrc" in line
    assert files(f"{name}-stopped") == before


def test_a_run_with_blocks_that_hide_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Of half-visible blocks with complements, finished runs still count: see the reproduced figure below."""
    saved = Path("align-stopped/config.yaml")
    text = saved.read_text().replace("mask: uniform", "mask: block")
    saved.write_text(text.replace("block_min_patches: 16", "block_min_patches: 2"))
    blocks = "--mask block --block-min-patches 2"
    run(f"align --config align.yaml {blocks} --crop rkrc --out align-stopped --resume", code=2)
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "block masks hide rectangles" in line
    assert "in another folder" in line


def test_another_config_is_still_refused(capsys: pytest.CaptureFixture[str]) -> None:
    run("align --config align.yaml --out align-stopped --resume --ema 0.8", code=2)
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "0.9" in line
    assert "0.8" in line


def test_a_finished_run_has_nothing_left_to_do() -> None:
    before, log = content("align-finished/results.json"), Path("align-finished/log.jsonl").read_text()
    run("align --config align.yaml --crop rkrc --out align-finished --resume")
    after = content("align-finished/results.json")
    assert Path("align-finished/log.jsonl").read_text() == log
    for field in ("steps", "samples_digest", "final", "best", "target_scale", "teacher_sha256"):
        assert after[field] == before[field]
    assert_same_export("align-finished/export", OLD / "align-finished" / "export", atol=0)


# -- exports ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_python_loads_exports() -> None:
    expected = load_file("expected.safetensors")
    images = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None]
    found: dict[str, Tensor] = {}
    for name in ("start", "align-finished"):
        backbone: Any = localign.load(name)
        found[f"tokens {name}"] = backbone.tokens(backbone.normalise(images))
    student: Any = localign.load("align-finished", decoder=True)
    keep = torch.arange(9).remainder(2).eq(0)[None, None]
    found["reconstruction"] = student(backbone.normalise(images), keep)
    classifier = load_classifier("finetune-finished")
    found["logits"] = classifier(classifier.backbone.normalise(images))
    assert_close(found, expected)


def test_checkpoints_are_exported() -> None:
    run("export align-finished --out last")
    assert_same_export("last", "align-finished/export", atol=0)
    run("export align-stopped --checkpoint best --out best")
    marked = content("align-stopped/checkpoints/best.json")["step"]
    run(f"export align-stopped --checkpoint {marked} --out marked")
    assert_same_export("best", "marked", atol=0)
    run("export align-finished/export --out again")
    assert_close(load_file("again/model.safetensors"), load_file("last/model.safetensors"), atol=0)


def test_transformers_loads_a_vision_language_model() -> None:
    importlib.import_module("localign.vlm")  # makes the model known to transformers
    model = AutoModelForImageTextToText.from_pretrained("vlm-export", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained("vlm-export")
    batch = processor(text=[EXPECTED["question"]], images=[picture()], return_tensors="pt")
    answer = model.generate(**batch, max_new_tokens=12, do_sample=False)
    assert answer[0].tolist() == EXPECTED["generated"]


def test_a_vision_language_model_is_exported_and_answers(capsys: pytest.CaptureFixture[str]) -> None:
    run("vlm export vlm-finished --out again --dtype bfloat16")
    assert_same_export("again", "vlm-export", atol=0)
    capsys.readouterr()
    question = f'--question "{EXPECTED["question"]}" --max-new-tokens 12 --device cpu'
    run(f"vlm chat vlm-finished {EXPECTED['picture']} {question}")
    assert capsys.readouterr().out.splitlines()[0] == EXPECTED["chat"]


@pytest.mark.parametrize(
    "command",
    [
        "finetune --backbone finetune-finished --data shards --device cpu",
        "finetune --backbone pretrain-finished --data scenes:val --val-images 8 --device cpu",
        "vlm train --init vlm-finished --data conversations.json --images photos --device cpu",
    ],
)
def test_new_runs_start_from_old_exports(command: str) -> None:
    run(f"{command} --steps 1 --batch-size 2 --workers 0 --max-bad-share 0.5 --out new")
    assert content("new/results.json")["steps"] == 1


# -- recipes and options ---------------------------------------------------------------------------------


def test_every_recipe_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    run("list recipes")
    shown = {cell.strip() for line in capsys.readouterr().out.splitlines() for cell in line.split("│")}
    assert len(EXPECTED["recipes"]) > 90
    assert set(EXPECTED["recipes"]) <= shown


@pytest.mark.slow
@pytest.mark.parametrize("options", ["--config plan.yaml", as_options("plan.yaml")], ids=["file", "options"])
def test_a_plan_is_what_it_was(options: str) -> None:
    run(f"plan {options}")
    plan = content("plan.json")
    assert {name: plan[name] for name in EXPECTED["plan"]} == EXPECTED["plan"]


def test_a_vision_language_run_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    run("vlm train --config vlm.yaml --dry-run")
    assert "14" in capsys.readouterr().out


def test_python_takes_the_old_names_of_options() -> None:
    outcome = localign.align(
        "align-finished/export", data="photos", max_bad_share=0.2, scale_images=6, steps=4, batch_size=4, lr=1e-3,
        ema=0.9, warmup_share=0.5, warmup_start=0.25, workers=0, device="cpu", log_every=1, out="new",
    )  # fmt: skip
    assert outcome.results["steps"] == 4
    assert logged("new", "lr")[1] == pytest.approx(0.25e-3)
    (checkpoint,) = Path("new/checkpoints").glob("step-*")
    assert (checkpoint / "ema.safetensors").is_file()


# -- data ------------------------------------------------------------------------------------------------


def test_shards_are_used_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    before = files("shards")
    run("data shard photos shards --shard-images 8 --workers 0 --seed 3")  # the shards are complete
    assert "packed     12 images" in capsys.readouterr().out
    run("data verify shards --workers 0 --out bad.jsonl", code=1)
    (bad,) = Path("bad.jsonl").read_text().splitlines()
    assert json.loads(bad)["path"] == "blue/10.png"
    run("data stats shards --workers 0 --out stats.json")
    assert content("stats.json")["images"] == 12
    assert files("shards") == before, "the index still fits"


def test_remote_shards_are_read(old: Path) -> None:
    run(f"data stats file://{old}/shards --workers 0 --out stats.json")
    assert content("stats.json")["images"] == 12


# -- what evaluations left -------------------------------------------------------------------------------


@pytest.mark.slow
def test_cached_features_are_used_again(capsys: pytest.CaptureFixture[str]) -> None:
    before = files("probe-cache")
    run(
        "probe before=start,after=align-finished --train-scenes 32 --test-scenes 16 --batch-size 8 --steps 4 "
        "--heads linear,transformer --cache disk --cache-dir probe-cache --device cpu --out again"
    )
    assert "writing" not in capsys.readouterr().err
    after = files("probe-cache")
    assert {n: c for n, c in after.items() if not n.endswith(".lock")} == before
    ours, theirs = content("again/results.json"), content("probe/results.json")
    assert ours["classes"] == theirs["classes"]
    for name, (outcome,) in theirs["probe"].items():
        for head, tasks in outcome["results"]["test"].items():
            for task, metrics in tasks.items():
                found = ours["probe"][name][0]["results"]["test"][head][task]
                assert found["accuracy"] == pytest.approx(metrics["accuracy"], abs=0.01)


def test_no_question_is_asked_twice() -> None:
    results, responses = content("eval/results.json"), files("eval/responses")
    run("vlm eval vlm-finished --benchmarks scenes --data vlm-demo/test --device cpu --out eval")
    assert files("eval/responses") == responses
    again = content("eval/results.json")
    edition = again["benchmarks"]["scenes"].pop("edition")  # new, of the question files
    assert len(edition) == 16
    assert (again["benchmarks"], again["model"]) == (results["benchmarks"], results["model"])


def test_answers_are_scored_compared_and_drawn() -> None:
    before = {name: Path("eval", name).read_text() for name in ("results.json", "answers.jsonl")}
    run("vlm score eval")
    assert content("eval/results.json")["benchmarks"] == json.loads(before["results.json"])["benchmarks"]
    assert Path("eval/answers.jsonl").read_text() == before["answers.jsonl"]
    run("vlm score first=vlm-demo/baseline-mlp-seed0/eval second=eval --out compared")
    assert list(Path("compared").iterdir())
    run("vlm show eval --limit 2 --out shown")
    assert len(list(Path("shown").glob("*.png"))) == 2


@pytest.mark.parametrize("folder", ["align-stopped", "align-finished", "probe", "demo"])
def test_a_report_is_written_again(folder: str) -> None:
    run(f"report {folder}")
    page = Path(folder, "report.html").read_text()
    assert len(page) > 10_000
    assert "0.1.0" in page


@pytest.mark.parametrize(
    ("command", "option"), [("demo", "--lr"), ("vlm demo --models baseline-mlp", "--questions")]
)
def test_a_demo_of_other_options_is_refused(
    command: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the option that differs from the saved config, and no other option."""
    folder = command.split(" --")[0].replace(" ", "-")
    saved = yaml.safe_load(Path(folder, "config.yaml").read_text())["config"]
    given = [
        f"--{name.replace('_', '-')} {','.join(value) if isinstance(value, list) else value}"
        for name, value in saved.items()
        if value is not None and name != "models"
    ]
    run(f"{command} {' '.join(given)} {option} 7", code=2)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert option.removeprefix("--") in line
    assert "steps" not in line


def test_a_reproduced_figure_is_drawn_without_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    runs = files("reproduce/scenes/align") | files("reproduce/scenes/probe")
    before = content("reproduce/scenes/fig7-quick/results.json")
    command = "reproduce fig7 --quick --device cpu --out reproduce"
    run(f"{command} --dry-run")  # training would take minutes
    assert "all runs are done" in capsys.readouterr().out
    run(command)
    assert files("reproduce/scenes/align") | files("reproduce/scenes/probe") == runs
    assert list(Path("reproduce/scenes/fig7-quick").glob("fig7*.png"))
    after = content("reproduce/scenes/fig7-quick/results.json")
    assert (after["probe"], after["runs"]) == (before["probe"], before["runs"])
