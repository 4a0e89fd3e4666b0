"""Recipes of vision-language models: each parses, and builds on the meta device with the published shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from localign.cli import main, parse
from localign.options.vlm.train import VLMConfig
from localign.planning.vlm import plan_vlm
from localign.recipes import read_recipe, recipe_names

RECIPES = [n for n in recipe_names() if n.startswith("vlm/")]

ADAPTERS = {
    "baseline": (20_979_712, 21_504_000),
    "transformer": (31_037_440, 38_778_112),
    "truncated": (29_392_896, 35_204_000),
    "aligned-mlp": (20_979_712, 21_504_000),
    "aligned-decoder": (31_037_440, 38_778_112),
    "aligned-truncated": (29_392_896, 35_204_000),
    "fused": (67_125_248, 71_385_600),
}
"""Parameters for CLIP ViT-L at 336 px and SigLIP SO400M at 384 px."""
TOKENS = {"clip-336px": (576, 577), "siglip-384px": (729, 729)}
"""Image tokens without and with prefix tokens."""
STEPS = {"": (10_395, 311), "-external": (19_231, 576)}
"""(steps, warm-up steps). The published runs have one step more, because they round up each epoch and not the run."""
LLAMA_2 = 6_738_415_616 + 2 * 64 * 4096
"""Parameters with 32,064 rows of embeddings instead of 32,000."""


def config_of(name: str) -> VLMConfig:
    config = parse("vlm train", ["--config", name])
    assert isinstance(config, VLMConfig)
    return config


def test_every_configuration_of_the_paper_has_a_recipe() -> None:
    rows = [*ADAPTERS, "aligned-fused"]
    assert set(RECIPES) == {f"vlm/{row}-{vit}{mix}" for row in rows for vit in TOKENS for mix in STEPS}


@pytest.mark.parametrize("name", RECIPES)
def test_the_settings_are_the_published_ones(name: str) -> None:
    config = config_of(name)
    assert (config.lr, config.weight_decay, config.betas, config.clip_grad) == (2e-5, 0.1, (0.9, 0.999), 1.0)
    assert (config.warmup_ratio, config.warmup_init_ratio, config.min_lr_ratio) == (0.03, 0.0, 0.0)
    assert (config.batch_size, config.micro_batch, config.epochs, config.seed) == (128, 16, 2, 7)
    assert (config.prompt, config.resize, config.stage) == ("in-out", "naive", "finetune")


@pytest.mark.parametrize("name", [n for n in RECIPES if not n.endswith("-external")])
def test_a_recipe_builds_with_the_published_shapes(name: str) -> None:
    vit = next(v for v in TOKENS if name.endswith(v))
    row = name.removeprefix("vlm/").removesuffix(f"-{vit}")
    model, plan = plan_vlm(config_of(name))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert plan.parameters["language model"] == LLAMA_2
    if row in ADAPTERS:
        assert plan.parameters["adapter"] == ADAPTERS[row][list(TOKENS).index(vit)]
    keeps = row not in ("baseline", "fused", "aligned-fused")
    assert plan.image_tokens == TOKENS[vit][keeps]
    assert plan.trainable == plan.parameters["adapter"] + plan.parameters["language model"]
    assert (plan.steps, plan.warmup_steps) == STEPS[""]


@pytest.mark.parametrize("vit", TOKENS)
def test_the_extended_mixture_takes_more_steps(vit: str) -> None:
    plan = plan_vlm(config_of(f"vlm/baseline-{vit}-external"))[1]
    assert (plan.records, plan.steps, plan.warmup_steps) == (1_230_808, *STEPS["-external"])


def test_sharding_divides_the_memory_of_trained_parameters() -> None:
    config = ["--config", "vlm/baseline-clip-336px", "--plan-ranks"]
    one, eight = (plan_vlm(parse("vlm train", [*config, ranks]))[1] for ranks in ("1", "8"))
    frozen = 4 * one.parameters["vision"]  # every rank of a sharded run holds the tower in float32
    assert one.bytes_per_rank == 16 * one.trainable + frozen
    assert eight.bytes_per_rank == 16 * one.trainable // 8 + frozen


def test_a_dry_run_prints_parameters_steps_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    name = "vlm/aligned-decoder-siglip-384px"
    assert main(["vlm", "train", "--config", name, "--dry-run", "--plan-ranks", "8"]) == 0
    out = capsys.readouterr().out
    assert "38,778,112 parameters" in out
    assert "10,395, 311 of them warm-up (665,298 conversations)" in out
    assert "GiB on each of 8 ranks" in out


def test_plan_takes_vlm_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, out = "vlm/aligned-decoder-siglip-384px", tmp_path / "plan.json"
    assert main(["vlm", "train", "--config", name, "--dry-run", "--plan-ranks", "8"]) == 0
    dry_run = capsys.readouterr().out
    for command in (["plan", f"--config={name}"], ["vlm", "plan", "--config", name]):
        assert main([*command, "--gpus", "8", "--gpu", "A100-40GB", "--out", str(out)]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(dry_run)
        assert "A100-40GB" in shown.removeprefix(dry_run)
        assert json.loads(out.read_text())["steps"] == 10_395
    assert main(["plan", "--config", name, "--gpus", "0"]) == 2
    assert "--gpus must be above 0" in capsys.readouterr().err


def test_recipes_name_their_command() -> None:
    assert {read_recipe(n).command for n in RECIPES} == {"vlm train"}
