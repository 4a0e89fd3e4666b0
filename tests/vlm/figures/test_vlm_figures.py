"""`localign reproduce` for figures of vision-language models: plans, drawings of what exists, and bad use."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_models import ALONE, ScriptedModel, suites
from torch import nn

from localign.cli import main
from localign.options.names import VLM_FIGURES
from localign.options.vlm.demo import MODELS
from localign.options.vlm.train import VLMConfig
from localign.planning.vlm import plan_vlm
from localign.planning.vlm_compute import TEXT_TOKENS, flops_per_conversation
from localign.recipes import recipe_names
from localign.vlm.benchmarks.table import BENCHMARKS as ALL_BENCHMARKS
from localign.vlm.evaluation.run import evaluate
from localign.vlm.figures import published, scenes
from localign.vlm.figures.models import model_names, published_models, scene_models

PNG = b"\x89PNG"


def reproduce(command: str) -> int:
    return main(["reproduce", *shlex.split(command)])


@pytest.fixture
def evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Evaluations of three of figure 12's four models, of which one lacks benchmarks, and of one of figure 13."""
    monkeypatch.chdir(tmp_path)
    asked = suites(tmp_path / "data", *published.BENCHMARKS)
    for name in (
        "truncated-clip-336px",
        "aligned-decoder-clip-336px",
        "truncated-siglip-384px",
        "fused-clip-336px",
    ):
        some = asked[:-2] if name == "truncated-siglip-384px" else asked
        evaluate(ScriptedModel(weights=name), some, tmp_path / "runs" / "eval" / name, ALONE, 8, name)
    return tmp_path / "runs" / "eval"


# -- published models --------------------------------------------------------------------------------------


def test_every_model_has_a_recipe_and_every_benchmark_exists() -> None:
    for target in VLM_FIGURES:
        own, others = published_models(target, Path("evals"))
        assert {model.figure for model in own} == {f"figure {target[3:]}"}
        assert not {model.label for model in own} & {model.label for model in others}
        for folder in (folder for model in own for folder in model.folders):
            assert folder.parent == Path("evals")
            assert f"vlm/{folder.name}" in recipe_names()
    assert set(published.BENCHMARKS) <= ALL_BENCHMARKS.keys()
    assert model_names()[:2] == ["baseline MLP", "aligned decoder"]


@pytest.mark.slow
def test_what_is_evaluated_is_drawn_and_what_is_missing_is_named(
    evaluations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce("fig12 --world llava --out made") == 0
    out = tmp_path / "made" / "llava" / "fig12"
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert "to do      1 alignments, 2 trainings, 2 evaluations" in lines
    assert "missing    runs/eval/aligned-decoder-siglip-384px: figure 12/SigLIP/aligned decoder" in lines
    assert "no answers to vizwiz, pope" in said
    assert "vizwiz: not answered by figure 12/SigLIP/baseline truncated" in said
    assert "Traceback" not in said
    for name in ("radar-figure-12.png", "bars-figure-12-CLIP.png", "bars-figure-12-SigLIP.png"):
        assert (out / name).read_bytes().startswith(PNG)
    results = json.loads((out / "results.json").read_text())
    assert results["command"] == "reproduce"
    assert list(results["evaluations"]) == [
        "figure 12/CLIP/baseline truncated", "figure 12/CLIP/aligned decoder", "figure 12/SigLIP/baseline truncated",
    ]  # fmt: skip
    assert "scaled by the 4 evaluated models" in " ".join(results["notes"])
    scales = json.loads((out / "comparison.json").read_text())["z_scores"]
    assert scales["models"]["vqav2: accuracy"] == 4
    assert set(scales["scores"]) == set(results["evaluations"])


def test_evaluations_elsewhere(
    evaluations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluations.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(published, "_with_cost", lambda run: run)
    for folder, count in (("elsewhere", 2), ("runs/eval", 4)):
        assert reproduce(f"fig12 --world llava --evaluations {folder} --dry-run") == 0
        assert f", {count} evaluations; " in capsys.readouterr().out


def test_with_no_evaluation_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reproduce("fig5 --world llava") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "fig5 cannot be drawn yet: none of its models is evaluated in runs/eval; --dry-run shows" in line


def test_a_dry_run_has_costs_commands_and_missing_data(
    evaluations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counted: list[str] = []

    def with_cost(run: published.PublishedRun) -> published.PublishedRun:
        counted.append(f"{run.kind} {run.name}")
        return replace(run, steps=1234, gpu_hours=50.0)

    monkeypatch.setattr(published, "_with_cost", with_cost)
    before = sorted(tmp_path.rglob("*"))
    assert reproduce("fig12 --world llava --dry-run") == 0
    assert sorted(tmp_path.rglob("*")) == before, "a dry run writes nothing"
    said = capsys.readouterr().out
    todo = [
        "aligning siglip-vit-so400m-384px", "training truncated-siglip-384px", "training aligned-decoder-siglip-384px",
        "evaluating truncated-siglip-384px", "evaluating aligned-decoder-siglip-384px",
    ]  # fmt: skip
    assert counted == todo, "what is done, and what only done runs read, costs nothing"
    assert "2 evaluations; 250 A100-hours" in said
    assert "missing    imagenet-21k, images to align on" in said
    assert "missing    llava-v1.5-instruct/llava_v1_5_mix665k.json, conversations and their images" in said
    commands = [line.removeprefix("command    ") for line in said.splitlines() if line.startswith("command ")]
    assert len(commands) == len(todo)
    assert commands[0].endswith(
        "localign align --config align/siglip-vit-so400m-384px --out runs/align/siglip-vit-so400m-384px"
    )
    assert commands[1].endswith("--config vlm/truncated-siglip-384px --out runs/vlm/truncated-siglip-384px")


@pytest.mark.slow
def test_the_cost_of_published_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaVA-1.5's authors trained one epoch of their 7B model in about ten hours on 8 A100."""
    monkeypatch.chdir(tmp_path)
    run = published._with_cost(published._training("baseline-clip-336px", needed=True))
    assert run.steps == 10395
    assert run.gpu_hours is not None
    assert 100 < run.gpu_hours < 200, "two epochs of 80 hours, of which attention and data take a part"


def test_operations_are_products_of_weights_and_tokens() -> None:
    """Compared with a count by hand."""
    config = VLMConfig(
        backbone=("vit_tiny_patch16_224",),
        data=("none.json",),
        llm="meta-llama/Llama-2-7b-hf",
        grad_checkpointing=True,
    )
    with torch.device("meta"):
        model, plan = plan_vlm(config)
    size = {name: sum(p.numel() for p in part.parameters()) for name, part in parts(model).items()}
    embedding = 4096 * model.language_model.get_input_embeddings().weight.shape[0]
    image, tokens = plan.image_tokens, plan.image_tokens + TEXT_TOKENS
    # Forward 2, gradients of inputs 2, gradients of weights 2, checkpointing 2 more.
    by_hand = (
        2 * size["vision"] * image + 6 * size["adapter"] * image + 8 * (size["llm"] - embedding) * tokens
    )
    assert flops_per_conversation(config, model, image) == by_hand
    model.language_model.requires_grad_(False)
    aligning = (
        2 * size["vision"] * image + 6 * size["adapter"] * image + 6 * (size["llm"] - embedding) * tokens
    )
    assert flops_per_conversation(config, model, image) == aligning


def parts(model: Any) -> dict[str, nn.Module]:
    return {"vision": model.vision, "adapter": model.adapter, "llm": model.language_model}


# -- scenes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [t for t in VLM_FIGURES if t != "fig13"])
def test_figures_on_scenes_have_the_demos_models(target: str, tmp_path: Path) -> None:
    models = scene_models(target, tmp_path, seeds=2)
    assert models.keys() <= MODELS.keys()
    assert [model.name for model in models.values()] == list(
        dict.fromkeys(model.name for model in published_models(target, tmp_path)[0])
    )
    for name, model in models.items():
        assert model.folders == tuple(tmp_path / f"{name}-seed{seed}" / "eval" for seed in range(2))


@pytest.mark.slow
def test_a_figure_on_scenes_from_runs_to_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {"scenes": 30, "test_scenes": 6, "questions": 3, "llm_steps": 3, "steps": 3, "batch_size": 4}
    monkeypatch.setattr(scenes, "_QUICK", tiny)
    all_models = scene_models

    def one_model(*args: Any) -> dict[str, Any]:
        return {"baseline-mlp": all_models(*args)["baseline-mlp"]}

    monkeypatch.setattr(scenes, "scene_models", one_model)  # the others take more time, and an alignment
    command = f"fig11 --quick --device cpu --out {tmp_path}"
    assert reproduce(f"{command} --dry-run") == 0
    assert list(tmp_path.iterdir()) == []
    said = capsys.readouterr().out
    assert "to do      6 training steps, 1 evaluations" in said
    assert reproduce(command) == 0
    out = tmp_path / "scenes" / "fig11-quick"
    assert (out / "bars-figure-11.png").read_bytes().startswith(PNG)
    results = json.loads((out / "results.json").read_text())
    assert list(results["evaluations"]) == ["figure 11/baseline MLP"]
    assert "A quick run" in " ".join(results["notes"])
    capsys.readouterr()
    assert reproduce(f"{command} --dry-run") == 0
    assert "to do      nothing: all runs are done" in capsys.readouterr().out


# -- bad use -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("fig13", "scenes have only one backbone; draw it with --world llava"),
        ("fig5 --world coco", "needs --world scenes or llava, not coco"),
        ("fig4 --world llava", "--world llava is for fig5, fig11, fig12, fig13, not for fig4"),
        ("fig4 --evaluations runs", "--evaluations needs --world llava"),
        ("fig5 --evaluations runs", "--evaluations has no effect on fig5 in the world scenes"),
        ("fig5 --protocol published", "--protocol has no effect on fig5 in the world scenes"),
        ("fig5 --micro-batch 2", "--micro-batch has no effect on fig5 in the world scenes"),
        ("fig5 --world llava --seeds 3", "--seeds has no effect on fig5 in the world llava"),
        ("fig5 --world llava --quick", "--quick has no effect on fig5 in the world llava"),
        ("fig5 --seeds 0", "--seeds must be at least 1, not 0"),
    ],
)
def test_bad_use_is_one_line(
    command: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce(f"{command} --out {tmp_path}/out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()
