"""The whole benchmark on a fake backbone: frozen, reproducible, independent heads, and able to fail."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from localign import rng
from localign.errors import RunFailure, UserError
from localign.probing import (
    AttributeLabels,
    Geometry,
    HeadSpec,
    PatchLabels,
    ProbeConfig,
    evaluate_heads,
    extract_features,
    probe,
    train_heads,
)
from localign.probing.training import learning_rate

GEOMETRY = Geometry(width=16, num_heads=2, num_patches=4, num_prefix_tokens=1)
CLASSES = 5


class FakeBackbone(nn.Module):
    """Tokens are mean patch colours behind a fixed projection; training mode would spoil them."""

    name = "fake"
    image_size, patch_size, grid = (8, 8), (4, 4), (2, 2)
    num_patches, num_prefix_tokens, width, num_heads = 4, 1, 16, 2

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter(weight)

    def normalise(self, images: Tensor) -> Tensor:
        return images.float() / 127.5 - 1

    def tokens(self, images: Tensor, layer: int = -1, norm: bool = True) -> Tensor:
        assert (layer, norm) == (-1, True)
        patches = images.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2)).flatten(2).transpose(1, 2)
        tokens = torch.cat([patches.mean(1, keepdim=True), patches], dim=1) @ self.weight
        return tokens * math.nan if self.training else tokens


class Colours:
    """2 x 2 patches, each black (unlabeled), red, green or blue."""

    kind = "colours"
    classes: tuple[str, ...] = ("unlabeled", "red", "green", "blue")

    def __init__(self, length: int, split: str) -> None:
        self.length, self.split = length, split

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"{self.split}-{index}"

    def fingerprint(self) -> str:
        return f"{self.split}{self.length}"

    def load_labelled(self, index: int) -> tuple[Image.Image, np.ndarray]:
        codes = rng.generator(0, self.split, index).integers(0, 4, (2, 2))
        labels = codes.repeat(4, 0).repeat(4, 1)
        palette = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=np.uint8)
        return Image.fromarray(palette[labels]), labels


def toy(count: int, seed: int) -> tuple[Tensor, PatchLabels]:
    """Features that carry their patch's class; the class token carries the image's."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, CLASSES, (count, 4), generator=generator)
    patch = nn.functional.one_hot(codes, CLASSES).bool()
    image = patch.any(1)
    tokens = torch.zeros(count, 5, 16)
    tokens[:, 1:, :CLASSES] = 4 * patch.float()
    tokens[:, 0, :CLASSES] = 4 * image.float()
    tokens += 0.1 * torch.randn(tokens.shape, generator=generator)
    return tokens, PatchLabels(patch, image, codes, CLASSES)


CONFIG = ProbeConfig(steps=120, batch=16, lr=1e-2, final_lr=1e-3, warmup_steps=10)
ALL = tuple(HeadSpec(head, task) for head in ("linear", "mlp", "transformer") for task in ("local", "global"))


def test_separable_features_are_read_and_shuffled_ones_are_not() -> None:
    features, labels = toy(200, 0)
    specs = (*ALL, HeadSpec("linear", "majority"))
    held_features, held_labels = toy(100, 1)
    trained = train_heads(features, labels, specs, GEOMETRY, CONFIG)
    results = evaluate_heads(trained.heads, held_features, held_labels, CONFIG)
    for head, tasks in results.items():
        for task, figures in tasks.items():
            assert figures["macro_recall"] == pytest.approx(1.0, abs=1e-3), (head, task)
    mixed = features[torch.randperm(200, generator=torch.Generator().manual_seed(2))]
    trained = train_heads(mixed, labels, specs, GEOMETRY, CONFIG)
    results = evaluate_heads(trained.heads, held_features, held_labels, CONFIG)
    for head in results:
        assert results[head]["local"]["macro_recall"] < 0.5


def test_a_head_trained_alone_equals_the_head_trained_among_others() -> None:
    features, labels = toy(50, 0)
    config = dataclasses.replace(CONFIG, steps=12, warmup_steps=2)
    together = train_heads(features, labels, ALL, GEOMETRY, config)
    for spec in ALL:
        alone = train_heads(features, labels, [spec], GEOMETRY, config)
        for name, value in alone.heads[spec].state_dict().items():
            assert torch.equal(value, together.heads[spec].state_dict()[name]), (spec, name)


def test_the_seed_decides_initialisation_and_order_and_nothing_global_does() -> None:
    features, labels = toy(50, 0)
    spec = HeadSpec("linear", "local")

    def weights(seed: int) -> Tensor:
        config = dataclasses.replace(CONFIG, steps=5, warmup_steps=1, seed=seed)
        return train_heads(features, labels, [spec], GEOMETRY, config).heads[spec].function.weight

    first = weights(0)
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    assert torch.equal(weights(0), first)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(weights(1), first)


def test_curves_tell_training_and_validation_loss_every_hundred_steps() -> None:
    features, labels = toy(60, 0)
    trained = train_heads(features, labels, ALL[:2], GEOMETRY, CONFIG, validation=toy(30, 1))
    assert [point["step"] for point in trained.curve] == [100, 120]
    first, last = (point["linear"]["local"] for point in trained.curve)
    assert set(first) == {"train", "validation"}
    assert last["train"] < first["train"]
    without = train_heads(features, labels, ALL[:2], GEOMETRY, CONFIG)
    for spec, head in trained.heads.items():  # looking at the validation loss changes nothing
        for a, b in zip(head.parameters(), without.heads[spec].parameters(), strict=True):
            assert torch.equal(a, b)


def test_learning_rate_warms_up_and_ends_on_the_final_rate() -> None:
    rates = [learning_rate(step, 1000, 500, 1e-3, 1e-4) for step in range(1000)]
    assert rates[0] == pytest.approx(2e-6)
    assert rates[499] == pytest.approx(1e-3)
    assert rates[500] == pytest.approx(5.5e-4)
    assert rates[-1] == pytest.approx(1e-4, rel=1e-3)


def test_the_backbone_stays_frozen_in_eval_mode_and_is_given_back_as_it_was() -> None:
    backbone = FakeBackbone().train()
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    maps = torch.zeros(3, 8, 8, dtype=torch.int64)
    batches = [(images[:2], maps[:2]), (images[2:], maps[2:])]
    features, labels = extract_features(backbone, batches, classes=4, dtype=torch.float32)
    assert backbone.training
    assert features.shape == (3, 5, 16)
    assert len(labels) == 3
    assert not features.requires_grad
    assert torch.isfinite(features).all()
    counted, _ = extract_features(backbone, batches, classes=4, count=3, dtype=torch.float32)
    assert torch.equal(counted, features)


def test_features_that_do_not_fit_the_cache_are_refused() -> None:
    backbone = FakeBackbone()
    backbone.weight.data *= 1e6
    batch = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8), torch.zeros(1, 8, 8, dtype=torch.int64)
    with pytest.raises(RunFailure, match=r"not finite in torch\.float16"):
        extract_features(backbone, [batch], classes=4)


def test_probe_end_to_end_is_json_and_sees_what_is_there() -> None:
    seen: list[tuple[str, int, int]] = []
    config = ProbeConfig(
        heads=("linear", "transformer", "transformer-cls-only", "transformer-anonymous"),
        tasks=("local", "global", "majority"),
        steps=150,
        batch=16,
        lr=1e-2,
        final_lr=1e-3,
        extract_batch=16,
    )
    sources = {"val": Colours(40, "val"), "test": Colours(24, "test")}
    backbone = FakeBackbone()
    before = backbone.weight.clone()
    result: dict[str, Any] = probe(
        backbone,
        Colours(100, "train"),
        sources,
        config,
        progress=lambda *told: seen.append(told),
    )
    assert torch.equal(backbone.weight, before)
    assert json.loads(json.dumps(result, allow_nan=False))["backbone"] == "fake"
    assert result["classes"] == list(Colours.classes)
    assert result["sources"]["test"] == {"kind": "colours", "images": 24, "fingerprint": "test24"}
    assert result["config"]["warmup_steps"] == 15
    assert list(result["results"]) == ["val", "test"]
    heads = result["results"]["test"]
    assert set(heads["transformer"]) == {"local", "global", "majority"}
    assert set(heads["transformer-cls-only"]) == {"local", "majority"}
    assert heads["transformer"]["local"]["macro_recall"] > 0.99
    assert heads["transformer"]["majority"]["macro_recall"] > 0.99
    # A mean colour does not say which patch has which colour.
    assert heads["transformer-cls-only"]["majority"]["macro_recall"] < 0.8
    assert ("features", 100, 100) in seen
    assert seen[-1] == ("heads", 150, 150)


def test_probe_with_an_attribute_table() -> None:
    table = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1]], dtype=bool)

    def labelled(length: int, split: str) -> AttributeLabels:
        return AttributeLabels(Colours(length, split), ("ground", "warm", "mixed"), table)

    config = dataclasses.replace(CONFIG, heads=("linear",), tasks=("local",))
    result = probe(FakeBackbone(), labelled(80, "train"), labelled(40, "val"), config)
    figures = result["results"]["val"]["linear"]["local"]
    assert len(figures["class_recall"]) == 3
    assert figures["macro_recall"] > 0.9


def test_misuse_is_refused_before_any_work() -> None:
    with pytest.raises(UserError, match="unknown probing head 'transfomer'"):
        ProbeConfig(heads=("transfomer",))
    with pytest.raises(UserError, match="each once"):
        ProbeConfig(tasks=())
    with pytest.raises(UserError, match="cache_dtype"):
        ProbeConfig(cache_dtype="int8")
    with pytest.raises(UserError, match="final_lr <= lr"):
        ProbeConfig(lr=1e-5)
    features, labels = toy(10, 0)
    with pytest.raises(UserError, match="shorter than the training"):
        train_heads(features, labels, ALL[:1], GEOMETRY, ProbeConfig(steps=10, warmup_steps=10))
    other = Colours(4, "val")
    other.classes = ("unlabeled", "other")
    with pytest.raises(UserError, match="'val' has other classes"):
        probe(FakeBackbone(), Colours(4, "train"), other)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    features, labels = toy(20, 0)
    features[3] = math.nan
    with pytest.raises(RunFailure, match="linear head"):
        train_heads(features, labels, ALL[:1], GEOMETRY, dataclasses.replace(CONFIG, steps=20))
