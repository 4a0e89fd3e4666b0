"""Classification fine-tuning: training, metrics, export, and errors."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from threads import one_thread  # noqa: F401
from torch import Tensor, nn

import localign
from localign.backbones import Backbone, create_backbone
from localign.cli import main
from localign.data.loader import Batch
from localign.engine import BatchPlan, StepResult, train
from localign.engine.distributed import DistributedContext
from localign.errors import UserError
from localign.finetuning import FinetuneConfig, FinetuneTask, ImageClassifier, finetune, load_classifier
from localign.finetuning.task import accuracy_counts, classification_loss, recall_counts, resolve_finetune

TINY = {"img_size": 24, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}


def class_folders(root: Path, count: int, seed: int, classes: tuple[str, ...] = tuple(COLOURS)) -> Path:
    """``count`` noisy images per class in the class's colour; classes that are not in COLOURS are grey."""
    draw = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise = draw.integers(-30, 31, (24, 24, 3))
            pixels = np.clip(np.array(COLOURS.get(name, (99, 99, 99))) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("train") / "data", 8, 0)


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("val") / "data", 3, 1)


def tiny(data: Path | str, out: Path | str = "unused", **options: Any) -> FinetuneConfig:
    values: dict[str, Any] = {
        "backbone": "vit_tiny_patch16_224", "weights": "none", "model_kwargs": TINY, "data": str(data),
        "out": str(out), "steps": 6, "batch_size": 8, "lr": 1e-3, "workers": 0, "log_every": 1,
        "checkpoint_every": 2, "device": "cpu", "crop": "published",
    }  # fmt: skip
    return FinetuneConfig(**{**values, **options})


def plan(batch: int = 8, micro: int = 8, steps: int = 1) -> BatchPlan:
    return BatchPlan(0, batch, micro, 0, 1, 0, 0, steps, False)


def last_layer(task: FinetuneTask) -> nn.Linear:
    """The last layer of a task's head."""
    linear = task.model.head.linear
    assert isinstance(linear, nn.Linear)
    return linear


def alone() -> DistributedContext:
    return DistributedContext(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def test_it_learns_what_the_folders_tell_apart(data: Path, val: Path, tmp_path: Path) -> None:
    results = finetune(tiny(data, tmp_path / "run", val=str(val), steps=40, lr=3e-3)).results
    assert results["final"]["val_top1"] == 1.0
    assert results["final"]["val_loss"] < 0.5
    assert results["classes"] == ["blue", "green", "red"]
    model = load_classifier(tmp_path / "run")
    red = torch.tensor(COLOURS["red"], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 24, 24)
    with torch.no_grad():
        assert model.classes[int(model(model.backbone.normalise(red)).argmax())] == "red"


def test_the_export_is_the_trained_backbone_with_its_head(data: Path, tmp_path: Path) -> None:
    config = tiny(data, tmp_path / "run", ema_decay=0.5)
    task = FinetuneTask(config)
    start = {k: v.clone() for k, v in task.model.backbone.vit.state_dict().items()}
    train(task, config, "finetune")
    backbone = localign.load(tmp_path / "run")
    assert isinstance(backbone, Backbone)
    assert not torch.equal(backbone.vit.blocks[0].attn.qkv.weight, start["blocks.0.attn.qkv.weight"])
    model = load_classifier(tmp_path / "run")
    assert not model.training
    averaged = load_file(tmp_path / "run" / "checkpoints" / "step-0000006" / "ema.safetensors")
    assert all(torch.equal(v, averaged[k]) for k, v in model.state_dict().items())
    images = torch.randn(2, 3, 24, 24)
    assert torch.equal(backbone.tokens(images), model.backbone.tokens(images))
    described = json.loads((tmp_path / "run" / "export" / "config.json").read_text())["localign"]
    assert described["classifier"]["classes"] == ["blue", "green", "red"]
    assert described["provenance"]["starting_sha256"] == task.starting_hash


def test_a_head_that_is_not_the_one_described_is_refused(data: Path, tmp_path: Path) -> None:
    task = FinetuneTask(tiny(data))
    task.export(task.module, tmp_path, {})
    state = load_file(tmp_path / "head.safetensors")
    save_file({**state, "linear.bias": state["linear.bias"] + 1}, tmp_path / "head.safetensors")
    with pytest.raises(UserError, match=r"head\.safetensors is damaged"):
        load_classifier(tmp_path)
    localign.backbones.save_backbone(task.model.backbone, tmp_path)
    with pytest.raises(UserError, match="a backbone without a classifier"):
        load_classifier(tmp_path)


class _Stopping(FinetuneTask):
    """A run that is interrupted before a step."""

    def __init__(self, config: FinetuneConfig, before: int) -> None:
        super().__init__(config)
        self.before = before

    def step(self, model: nn.Module, batch: Batch) -> StepResult:
        if int(batch.positions[0]) == self.before * self.config.batch_size:
            raise KeyboardInterrupt
        return super().step(model, batch)


def test_a_resumed_run_equals_an_uninterrupted_one(data: Path, val: Path, tmp_path: Path) -> None:
    options = {"val": str(val), "val_every": 3, "mixup": 0.8, "cutmix": 1.0}
    whole = finetune(tiny(data, tmp_path / "whole", **options)).results
    config = tiny(data, tmp_path / "parts", **options)
    with pytest.raises(KeyboardInterrupt):
        train(_Stopping(config, before=5), config, "finetune")
    resumed = finetune(replace(config, resume="must")).results
    for file in ("model", "optimizer"):
        ours, theirs = (
            load_file(tmp_path / name / "checkpoints" / "step-0000006" / f"{file}.safetensors")
            for name in ("parts", "whole")
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs), file
    for name in ("samples_digest", "final", "best"):
        assert resumed[name] == whole[name], name


def test_a_run_is_not_continued_on_other_labels(data: Path, tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        rows = [f"{data / colour / f'{i}.png'},{colour}" for colour in COLOURS for i in range(8)]
        if name == "b.csv":
            rows[0] = rows[0].replace(",blue", ",red")
        (tmp_path / name).write_text("\n".join(rows))
    first, other = (
        FinetuneTask(tiny(tmp_path / name, allow_outside=True)).fingerprint() for name in ("a.csv", "b.csv")
    )
    assert {k for k in first if first[k] != other[k]} == {"labels"}


@pytest.mark.parametrize("options", [{}, {"mixup": 0.8, "cutmix": 1.0}])
@torch.no_grad()
def test_a_step_is_the_same_however_it_is_split(data: Path, options: dict[str, Any]) -> None:
    task = FinetuneTask(tiny(data, **options))
    sums = []
    for micro in (8, 2):
        parts = [task.step(task.module, batch) for batch in task.batches(plan(micro=micro))]
        sums.append(torch.stack([torch.stack([p.loss_sum, p.weight]) for p in parts]).sum(0))
    torch.testing.assert_close(*sums)
    assert sums[0][1] == 8


def test_labels_are_those_of_the_images_that_were_read(tmp_path: Path) -> None:
    """Also if an unreadable image was replaced by an image of another class."""
    root = class_folders(tmp_path / "data", 4, 0)
    for i in range(3):
        (root / "green" / f"{i}.png").write_bytes(b"no image")
    task = FinetuneTask(tiny(root, max_bad_share=0.5, hflip=0.0))
    replaced = 0
    for batch in task.batches(plan(steps=3)):
        targets = task.views(batch)[1]
        assert torch.equal(batch.images.float().mean((2, 3)).argmax(1), 2 - targets.argmax(1))
        replaced += len(batch.bad)
    assert replaced > 0


def test_mixed_images_have_mixed_targets(data: Path) -> None:
    task = FinetuneTask(tiny(data, mixup=0.8, cutmix=1.0))
    plain = FinetuneTask(tiny(data))
    batch = next(iter(task.batches(plan())))
    targets, own = task.views(batch)[1], plain.views(batch)[1]
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    for pair in range(0, 8, 2):
        torch.testing.assert_close(targets[pair : pair + 2].sum(0), own[pair : pair + 2].sum(0))
    assert not torch.equal(targets, own)


def test_losses_are_the_textbook_ones() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    codes = torch.tensor([0, 3, 3, 1, 2])
    targets = torch.eye(4)[codes]
    total, count = classification_loss(logits, targets, multi_label=False, smoothing=0.1)
    log = logits.log_softmax(1)
    expected = -(0.9 * log[torch.arange(5), codes] + 0.1 * log.mean(1)).sum()
    torch.testing.assert_close(total, expected)
    assert count == 5
    total, count = classification_loss(logits, targets, multi_label=True)
    p = logits.sigmoid()
    torch.testing.assert_close(total, -(targets * p.log() + (1 - targets) * (1 - p).log()).sum())
    assert count == 20


def test_hits_are_counted() -> None:
    logits = torch.tensor([[6.0, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6]])
    assert accuracy_counts(logits, torch.eye(6)[[1, 5]]).tolist() == [[1, 2], [2, 2]]
    assert accuracy_counts(logits, torch.eye(6)[[5, 0]]).tolist() == [[0, 0], [2, 2]]
    present = torch.tensor([[1.0, 0, 1], [1, 0, 0]])
    assert recall_counts(torch.tensor([[1.0, 1, -1], [-1, -1, 1]]), present).tolist() == [
        [1, 0, 0],
        [2, 0, 1],
    ]


class _Rank(DistributedContext):
    """One of two ranks without communication: it records the values that it would sum over ranks."""

    recorded: list[Tensor]

    def all_reduce(self, values: Tensor) -> Tensor:
        self.recorded.append(values.clone())
        return values


@torch.no_grad()
def test_ranks_share_the_validation(data: Path, val: Path) -> None:
    task = FinetuneTask(tiny(data, val=str(val), val_images=5))
    recorded = []
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        context = _Rank(rank, size, rank, torch.device("cpu"))
        object.__setattr__(context, "recorded", [])
        task.validate(task.module.eval(), context)
        recorded.append(context.recorded)
    for whole, *parts in zip(*recorded, strict=True):
        torch.testing.assert_close(whole, parts[0] + parts[1])
    assert recorded[0][1][1].tolist() == [5, 5]


@torch.no_grad()
def test_validation_spreads_over_the_classes_and_counts_the_five_best_from_six_on(
    data: Path, val: Path, tmp_path: Path
) -> None:
    task = FinetuneTask(tiny(data, val=str(val), val_images=3))
    assert task.val_labels is not None
    assert task.val_labels.targets(task.val_indices).argmax(1).tolist() == [0, 1, 2]
    assert task.validate(task.module.eval(), alone()).keys() == {"val_loss", "val_top1"}
    six = class_folders(tmp_path / "six", 1, 0, tuple("abcdef"))
    task = FinetuneTask(tiny(six, val=str(six)))
    # The head ignores the image, so all images have the same ranking of classes.
    linear = last_layer(task)
    linear.weight.zero_()
    linear.bias.copy_(torch.arange(6).float())
    metrics = task.validate(task.module.eval(), alone())
    assert metrics["val_top1"] == pytest.approx(1 / 6)
    assert metrics["val_top5"] == pytest.approx(5 / 6)
    # Without the smoothing of the training loss.
    assert metrics["val_loss"] == pytest.approx(float(-torch.arange(6).float().log_softmax(0).mean()))
    assert FinetuneTask(tiny(data)).validate(task.module, alone()) == {}


@torch.no_grad()
def test_scenes_are_judged_by_macro_recall() -> None:
    config = resolve_finetune(tiny("scenes", crop=None, val_images=6, model_kwargs={**TINY, "img_size": 48}))
    assert (config.crop, config.batch_size) == ("none", 8)
    task = FinetuneTask(config)
    batch = next(iter(task.batches(plan())))
    result = task.step(task.module, batch)
    assert result.weight == 8 * len(task.labels.classes)
    linear = last_layer(task)
    linear.weight.zero_()
    linear.bias.fill_(1.0)
    assert task.validate(task.module.eval(), alone())["val_recall"] == 1.0
    linear.bias[: len(task.labels.classes) // 2] = -1.0
    shown = torch.stack([task.val_labels.targets(task.val_indices)]).flatten(0, 1).any(0)  # type: ignore[union-attr]
    expected = shown[len(shown) // 2 :].sum() / shown.sum()
    assert task.validate(task.module, alone())["val_recall"] == pytest.approx(float(expected))


def test_a_frozen_backbone_stays_as_it_was_and_in_eval_mode(data: Path, tmp_path: Path) -> None:
    kwargs = {**TINY, "drop_path_rate": 0.5}
    config = tiny(data, tmp_path / "run", freeze=True, model_kwargs=kwargs)
    task = FinetuneTask(config)
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    outcome = train(task, config, "finetune")
    changed = {k for k, v in task.model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(k.startswith("head.") for k in changed)
    assert outcome.results["trainable_parameters"] == sum(p.numel() for p in task.model.head.parameters())
    task.model.train()
    assert task.model.head.training
    assert not task.model.backbone.training


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_base_patch16_siglip_224", {}),  # attention pooling
        ("vit_base_patch16_224", {"global_pool": "avg"}),  # a norm after pooling only
        ("vit_base_patch14_reg4_dinov2", {"patch_size": 8}),
        ("beit_base_patch16_224", {}),
        ("eva02_base_patch16_clip_224", {}),
    ],
)
def test_whatever_is_trained_gets_a_gradient(name: str, kwargs: dict[str, Any]) -> None:
    """Training with several processes and resuming need this."""
    size = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2, **kwargs}
    backbone = create_backbone(name, weights="none", model_kwargs=size)
    model = ImageClassifier(backbone, "abc")
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert [n for n, p in backbone.vit.blocks.named_parameters() if not p.requires_grad] == []


def test_a_backbone_that_was_given_stays_as_it_is(data: Path) -> None:
    backbone = create_backbone("vit_tiny_patch16_224", weights="none", model_kwargs=TINY).requires_grad_(
        False
    )
    task = FinetuneTask(tiny(data), backbone)
    assert task.model.backbone is not backbone
    assert task.model.backbone.vit.blocks[0].attn.qkv.weight.requires_grad
    assert not backbone.vit.blocks[0].attn.qkv.weight.requires_grad


def test_the_head_is_a_function_of_the_seed(data: Path) -> None:
    torch.manual_seed(1)
    first = last_layer(FinetuneTask(tiny(data))).weight
    torch.manual_seed(2)
    assert torch.equal(last_layer(FinetuneTask(tiny(data))).weight, first)
    assert not torch.equal(last_layer(FinetuneTask(tiny(data, seed=1))).weight, first)


OPTIONS = (
    "--backbone vit_tiny_patch16_224 --weights none --steps 2 --workers 0 --device cpu --crop published "
    "--model-kwargs img_size=24 patch_size=8 embed_dim=24 depth=2 num_heads=2"
)


def test_the_command_fine_tunes_a_run_of_its_own(data: Path, val: Path, tmp_path: Path) -> None:
    first = f"finetune {OPTIONS} --data {data} --val {val} --out {tmp_path / 'first'} --grad-checkpointing"
    assert main(shlex.split(first)) == 0
    second = (
        f"finetune --backbone {tmp_path / 'first'} --data {data} --steps 1 --workers 0 --freeze "
        f"--device cpu --out {tmp_path / 'second'}"
    )
    assert main(shlex.split(second)) == 0
    ours, theirs = (load_file(tmp_path / n / "export" / "model.safetensors") for n in ("second", "first"))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    config = json.loads((tmp_path / "second" / "results.json").read_text())["config"]
    assert (config["batch_size"], config["crop"], config["decode"]) == (8, "rrc", "scaled")


def refusal(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(shlex.split(command)) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_what_cannot_be_classified_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = f"finetune {OPTIONS} --out {out}"
    flat, single, other = tmp_path / "flat", tmp_path / "single", tmp_path / "other"
    class_folders(flat, 1, 0, (".",))
    class_folders(single, 1, 0, ("red",))
    class_folders(other, 1, 0, ("blue", "green", "pink"))
    assert "has no class folders" in refusal(f"{command} --data {flat}", capsys)
    assert "has a single class, 'red'" in refusal(f"{command} --data {single}", capsys)
    line = refusal(f"{command} --data {data} --val {other}", capsys)
    assert line.startswith(f"localign: {other} and the training data have different classes")
    assert line.endswith("lacks red and adds pink")
    (single / "blue").mkdir()
    assert "blue holds no image" in refusal(f"{command} --data {single}", capsys)
    odd = f"{command} --data {data} --mixup 0.5 --batch-size 9"
    assert "whole neighbouring pairs" in refusal(odd, capsys)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--label-smoothing 1", "--label-smoothing must lie in 0..1"),
        ("--freeze --grad-checkpointing", "--grad-checkpointing has no effect with --freeze"),
        ("--val-images 0", "--val-images must be above 0"),
        ("--backbone scenes-vit --label-smoothing 0.1 --device cpu", "images of one class each"),
    ],
)
def test_options_without_effect_are_refused(
    options: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(f"finetune {options}", capsys)
