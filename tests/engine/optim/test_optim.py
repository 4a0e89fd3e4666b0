"""Parameter groups, learning rates, warm-up, clipping, and the division of batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from engine_runs import DisturbedAlignment, logged, run, tiny, weights
from torch import nn

from localign.engine.distributed import DistributedContext
from localign.engine.optim.build import build_optimizer, decays, hidden_matrices, learning_rate, set_rates
from localign.engine.schedule import batch_shares, total_steps, with_warmup_steps
from localign.engine.task import BatchPlan
from localign.errors import UserError
from localign.options.train import TrainConfig


def decayed(module: nn.Module) -> set[str]:
    """Names of the parameters with weight decay."""
    optimizer = build_optimizer(module, TrainConfig(weight_decay=0.1))
    names = {id(p): n for n, p in module.named_parameters()}
    groups = {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in optimizer.param_groups}
    assert groups[0.1] | groups[0.0] == set(names.values())
    assert not groups[0.1] & groups[0.0]
    return groups[0.1]


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_tiny_patch16_224", {"init_values": 1e-5}),
        ("vit_tiny_patch16_224", {"reg_tokens": 4}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("beit_base_patch16_224", {}),
        ("eva02_tiny_patch14_224", {}),
    ],
)
def test_only_matrices_decay(name: str, kwargs: dict[str, Any]) -> None:
    module = timm.create_model(name, num_classes=0, embed_dim=24, depth=1, num_heads=2, **kwargs)
    names = decayed(module)
    assert any(n.endswith("qkv.weight") or n.endswith("q_proj.weight") for n in names)
    for parameter, _ in module.named_parameters():
        kinds = ("bias", "norm", "gamma", "pos_embed", "token", "bias_table")
        if any(kind in parameter for kind in kinds):
            assert parameter not in names, parameter


def test_muon_gets_the_matrices_in_blocks(tmp_path: Path, images: Path) -> None:
    module = DisturbedAlignment(tiny(tmp_path, images)).module
    shapes = {name: p.ndim for name, p in module.named_parameters()}
    names = hidden_matrices(module)
    assert {shapes[name] for name in names} == {2}
    blocks = {n for n, ndim in shapes.items() if ".blocks." in n and ndim == 2}
    assert names == blocks
    module.encoder.requires_grad_(False)
    assert hidden_matrices(module) == {n for n in blocks if n.startswith("decoder.")}


def small_network(seed: int) -> nn.ModuleDict:
    torch.manual_seed(seed)
    return nn.ModuleDict({"layers": nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), "head": nn.Linear(4, 3)})


def stepped(optimizer: str, factors: dict[str, float], rate: float = 0.01) -> dict[str, torch.Tensor]:
    """The change of each parameter in two steps."""
    module = small_network(0)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    chosen = build_optimizer(module, TrainConfig(optimizer=optimizer, weight_decay=0.1), rates=factors)  # type: ignore[arg-type]
    set_rates(chosen, rate)
    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.randn(16, 6)
        module["head"](module["layers"](x)).square().mean().backward()
        chosen.step()
        chosen.zero_grad()
    return {n: p.detach() - before[n] for n, p in module.named_parameters()}


def test_muon_steps_have_full_rank_and_the_size_of_adamw_steps() -> None:
    rate = 0.01
    muon, adamw = stepped("muon", {}, rate), stepped("adamw", {}, rate)
    for name in ("layers.0.weight", "layers.1.weight"):
        shares = [torch.linalg.svdvals(step[name]).square() for step in (muon, adamw)]
        largest, of_adamw = (float(share.max() / share.sum()) for share in shares)
        assert largest < 0.6
        assert of_adamw > 0.95
        assert 0.1 * rate < muon[name].square().mean().sqrt() < 0.5 * rate
    for name in ("head.weight", "layers.0.bias"):  # AdamW in both runs
        assert 0.5 < muon[name].square().mean().sqrt() / adamw[name].square().mean().sqrt() < 2
    assert not any(step.any() for step in stepped("muon", {}, 0.0).values())


def test_learning_rate_factors_work_with_muon() -> None:
    full, slowed = stepped("muon", {}), stepped("muon", {"layers.1": 0.0})
    assert not slowed["layers.1.weight"].any()
    assert not slowed["layers.1.bias"].any()
    assert slowed["layers.0.weight"].any()
    assert slowed["head.weight"].any()
    assert full["layers.1.weight"].any()


def test_muon_is_refused_in_sharded_runs() -> None:
    with pytest.raises(UserError, match="full matrices"):
        TrainConfig(optimizer="muon", sharding="full")


def test_weight_decay_of_the_student(tmp_path: Path, images: Path) -> None:
    names = decayed(DisturbedAlignment(tiny(tmp_path, images)).module)
    assert {
        "encoder.head.weight",
        "decoder.head.weight",
        "encoder.backbone.vit.patch_embed.proj.weight",
    } <= names
    assert not {n for n in names if "pos_embed" in n or "token" in n or "gamma" in n or "norm" in n}


def test_frozen_parameters_are_in_no_group(tmp_path: Path, images: Path) -> None:
    module = DisturbedAlignment(tiny(tmp_path, images, train_blocks=1)).module
    optimizer = build_optimizer(module, TrainConfig())
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in module.parameters() if p.requires_grad}
    assert len(held) < len(list(module.parameters()))


def test_vectors_never_decay() -> None:
    assert decays("a.weight", nn.Linear(2, 2).weight)
    assert not decays("a.weight", nn.LayerNorm(2).weight)


def test_the_schedule() -> None:
    config = TrainConfig(steps=100, lr=2.0, warmup_steps=10, min_lr_ratio=0.25)
    rates = [learning_rate(s, 100, config) for s in range(101)]
    assert rates[0] == pytest.approx(0.2), "warm-up starts at a tenth"
    assert rates[5] == pytest.approx(2.0 * 0.55), "and is linear"
    assert rates[10] == pytest.approx(2.0), "the peak follows the last warm-up step"
    assert rates[55] == pytest.approx(2.0 * (0.25 + 0.75 / 2)), "the cosine's middle"
    assert rates[100] == pytest.approx(0.5), "the last rate is a quarter of the peak"
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[40] == pytest.approx(2.0 * (0.25 + 0.75 * (1 + math.cos(math.pi / 3)) / 2))


def test_a_warm_up_from_zero() -> None:
    # The published language model recipe: 3 % of 10,396 steps, and rate 0 in the first step.
    config = TrainConfig(
        epochs=2, batch_size=128, lr=2e-5, warmup_ratio=0.03, warmup_init_ratio=0.0, min_lr_ratio=0.0
    )
    config = with_warmup_steps(config, 665_344)
    steps = total_steps(config, 665_344)
    assert (steps, config.warmup_steps) == (10_396, 311)
    rates = [learning_rate(s, steps, config) for s in (0, 1, 311, steps)]
    assert rates == pytest.approx([0.0, 2e-5 / 311, 2e-5, 0.0], abs=1e-12)


@pytest.mark.parametrize(("share", "steps"), [(0.29, 29), (0.299, 29), (0.001, 0), (0.99, 99)])
def test_a_warm_up_as_a_share_is_rounded_down(share: float, steps: int) -> None:
    config = with_warmup_steps(TrainConfig(steps=100, warmup_ratio=share), 7)
    assert (config.warmup_steps, config.warmup_ratio) == (steps, None)


def test_no_warm_up() -> None:
    assert learning_rate(0, 10, TrainConfig(steps=10, lr=1.0)) == 1.0


def test_a_warm_up_in_epochs_is_converted_to_steps(tmp_path: Path, images: Path) -> None:
    config = TrainConfig(epochs=4, batch_size=10, warmup_epochs=0.5)
    assert with_warmup_steps(config, 100).warmup_steps == 5
    assert with_warmup_steps(TrainConfig(warmup_steps=3), 100).warmup_steps == 3
    one_step = 8 / len(list(images.iterdir()))
    run(tiny(tmp_path, images, warmup_steps=0, warmup_epochs=one_step))
    rates = logged(tmp_path, "lr")
    assert rates[1] == pytest.approx(1e-4), "from a tenth"
    assert rates[2] == pytest.approx(1e-3), "to the peak after one step"


@pytest.mark.parametrize("clip", [None, 1e-3, 1e3])
def test_the_gradient_of_the_mean_is_clipped(tmp_path: Path, images: Path, clip: float | None) -> None:
    config = tiny(tmp_path, images, clip_grad=clip, checkpoint_every=1, keep_checkpoints=9, steps=3)
    run(config)
    task = DisturbedAlignment(config)
    plan = BatchPlan(config.seed, 8, 8, 0, 1, 0, 0, 1, False)
    task.on_train_start(DistributedContext(0, 1, 0, torch.device("cpu")), plan)
    result = task.step(task.module.train(), next(iter(task.batches(plan))))
    mean = result.loss_sum / result.weight
    torch.autograd.backward(mean)
    norm = float(nn.utils.get_total_norm([p.grad for p in task.module.parameters() if p.grad is not None]))
    assert logged(tmp_path, "loss")[1] == pytest.approx(mean.item(), rel=1e-5)
    assert logged(tmp_path, "grad_norm")[1] == pytest.approx(norm, rel=1e-4)
    # After one step the first moment is (1 - beta) times the gradient.
    moments = weights(tmp_path, 1, "optimizer.safetensors")
    given = nn.utils.get_total_norm([v for k, v in moments.items() if k.startswith("exp_avg.")]) / (
        1 - config.betas[0]
    )
    assert float(given) == pytest.approx(min(norm, clip or norm), rel=1e-3)


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "shares"),
    [(8, None, 1, (8, 8)), (8, None, 2, (4, 4)), (8, 2, 2, (4, 2)), (6, 3, 1, (6, 3))],
)
def test_division_of_a_batch(batch: int, micro: int | None, ranks: int, shares: tuple[int, int]) -> None:
    assert batch_shares(TrainConfig(batch_size=batch, micro_batch=micro), ranks) == shares


@pytest.mark.parametrize(("batch", "micro", "ranks"), [(9, None, 2), (1, None, 2), (8, 3, 1), (8, 8, 2)])
def test_batches_that_do_not_divide(batch: int, micro: int | None, ranks: int) -> None:
    with pytest.raises(UserError, match=f"batch size {batch} does not divide into {ranks} ranks"):
        batch_shares(TrainConfig(batch_size=batch, micro_batch=micro), ranks)


def test_the_length_of_a_run() -> None:
    assert total_steps(TrainConfig(steps=7), 100) == 7
    assert total_steps(TrainConfig(epochs=2, batch_size=10), 100) == 20
    assert total_steps(TrainConfig(epochs=0.001, batch_size=10), 100) == 1
    assert total_steps(TrainConfig(batch_size=10), 100) == 10
    with pytest.raises(UserError, match="--warmup-steps 20 must be below the run's 20 steps"):
        total_steps(TrainConfig(epochs=2, batch_size=10, warmup_steps=20), 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1, "epochs": 1.0}, "--steps and --epochs contradict"),
        ({"log_every": 0}, "--log-every must be above 0"),
        ({"keep_checkpoints": 0}, "--keep-checkpoints must be above 0"),
        ({"workers": -1}, "--workers cannot be negative"),
        ({"min_lr_ratio": 1.5}, "--min-lr-ratio must lie in"),
        ({"ema_decay": 1.0}, "--ema-decay must lie between"),
        ({"steps": 5, "warmup_steps": 5}, "--warmup-steps 5 must be below --steps 5"),
        ({"warmup_steps": 5, "warmup_epochs": 1.0}, "--warmup-steps and --warmup-epochs contradict"),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "--warmup-steps and --warmup-ratio contradict"),
        ({"warmup_epochs": 1.0, "warmup_ratio": 0.1}, "--warmup-epochs and --warmup-ratio contradict"),
        ({"warmup_ratio": 1.0}, "--warmup-ratio must lie below 1"),
        ({"warmup_ratio": 0.0}, "--warmup-ratio must be above 0"),
        ({"warmup_init_ratio": -0.1}, "--warmup-init-ratio must lie in"),
        ({"reduce_dtype": "bf16"}, "--reduce-dtype bf16 applies to sharded runs only"),
        ({"reshard_after_forward": False}, "--reshard-after-forward applies to sharded runs only"),
        (
            {"sharding": "full", "ddp_bucket_mb": 50.0},
            "--ddp-bucket-mb applies to unsharded runs only",
        ),
        ({"ddp_bucket_mb": 0.0}, "--ddp-bucket-mb must be above 0"),
        ({"micro_batch": 0}, "--micro-batch must be above 0"),
    ],
)
def test_options_that_contradict(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**options)  # type: ignore[arg-type]
