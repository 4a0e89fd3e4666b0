"""The benchmark on a fake backbone: frozen, reproducible, equal in every cache mode, and its errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from probing_toys import CONFIG, Colours, fake_backbone

from localign.errors import RunFailure, UserError
from localign.probing import AttributeLabels, HeadSpec, ProbeConfig, probe, probe_heads, suite
from localign.results import ProbeOutcome

SMALL = ProbeConfig(
    heads=("linear", "transformer"), steps=12, batch=16, extract_batch=16, cache_dtype="float32", curve_images=20
)  # fmt: skip
LOCAL = HeadSpec("linear", "local")


def figures(outcome: ProbeOutcome, source: str = "val") -> Any:
    return outcome["results"][source]["linear"]["local"]


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
    backbone = fake_backbone()
    before = backbone.weight.clone()
    (result,) = probe(
        backbone,
        Colours(100, "train"),
        sources,
        config,
        progress=lambda *done: seen.append(done),
    )
    assert torch.equal(backbone.weight, before)
    assert json.loads(json.dumps(result, allow_nan=False))["backbone"] == "fake"
    assert result["classes"] == list(Colours.classes)
    assert result["class_kinds"] is None
    assert (result["seed"], result["protocol"], len(result["backbone_sha256"])) == (0, "fixed", 64)
    assert result["sources"]["test"] == {"kind": "colours", "images": 24, "fingerprint": "test24"}
    assert result["config"]["warmup_steps"] == 15
    assert list(result["results"]) == ["val", "test"]
    heads: Any = result["results"]["test"]
    assert set(heads["transformer"]) == {"local", "global", "majority"}
    assert set(heads["transformer-cls-only"]) == {"local", "majority"}
    assert heads["transformer"]["local"]["macro_recall"] > 0.99
    assert heads["transformer"]["majority"]["macro_recall"] > 0.99
    # A mean colour does not say which patch has which colour.
    weak = heads["transformer-cls-only"]["majority"]
    assert weak["macro_recall"] < 0.8
    low, high = weak["macro_recall_interval"]
    assert low < weak["macro_recall"] < high
    assert "best_epoch" not in weak
    assert [point["step"] for point in result["train"]["curve"]] == [100, 150]
    for done in (("features", 100, 100), ("heads", 150, 150), ("evaluation", 24, 24)):
        assert done in seen


def test_every_seed_has_its_outcome_and_seeds_may_run_apart() -> None:
    both = probe(
        fake_backbone(), Colours(40, "train"), Colours(20, "val"), dataclasses.replace(SMALL, seeds=2)
    )
    assert [outcome["seed"] for outcome in both] == [0, 1]
    (second,) = probe(
        fake_backbone(), Colours(40, "train"), Colours(20, "val"), dataclasses.replace(SMALL, seed=1)
    )
    assert second["results"] == both[1]["results"]
    assert second["train"] == both[1]["train"]
    assert both[0]["train"]["curve"] != both[1]["train"]["curve"]


def test_all_modes_give_the_same_figures(tmp_path: Path) -> None:
    outcomes, forwards = {}, {}
    for cache in ("none", "disk", "device"):
        backbone = fake_backbone()
        config = dataclasses.replace(SMALL, cache=cache)
        (outcomes[cache],) = probe(
            backbone, Colours(40, "train"), Colours(20, "val"), config, cache_folder=tmp_path
        )
        forwards[cache] = backbone.forwards
    for cache in ("none", "disk"):
        assert outcomes[cache]["results"] == outcomes["device"]["results"]
        assert outcomes[cache]["train"] == outcomes["device"]["train"]
    # 12 steps of 16, the curve's images once, the evaluation; against each image once.
    assert forwards == {"none": 12 * 16 + 20 + 20, "disk": 60, "device": 60}
    assert {p.name for p in tmp_path.iterdir()} == {"train", "val"}


def test_the_backbone_stays_in_eval_mode_and_is_given_back_as_it_was() -> None:
    for cache in ("none", "device"):  # in training mode its tokens are not numbers
        backbone = fake_backbone().train()
        config = dataclasses.replace(SMALL, cache=cache)
        probe(backbone, Colours(40, "train"), Colours(20, "val"), config)
        assert backbone.training
        assert backbone.weight.grad is None


def test_features_that_do_not_fit_their_type_are_refused() -> None:
    backbone = fake_backbone()
    backbone.weight.data *= 1e6
    config = dataclasses.replace(SMALL, cache_dtype="float16")
    with pytest.raises(RunFailure, match=r"not finite in torch\.float16"):
        probe(backbone, Colours(40, "train"), Colours(20, "val"), config)


def test_features_too_large_for_memory_go_to_the_disk_or_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("localign.probing.memory.free_ram", lambda: 1000)
    monkeypatch.setattr(suite, "free_ram", lambda: 1000)
    arguments = fake_backbone(), Colours(40, "train"), Colours(20, "val")
    probe(*arguments, SMALL, cache_folder=tmp_path)
    assert (tmp_path / "train" / "cache.json").is_file()
    assert "the features are stored on disk" in capsys.readouterr().err
    with pytest.raises(UserError, match="give a cache folder, or the cache mode none"):
        probe(*arguments, SMALL)
    with pytest.raises(UserError, match="--cache disk or --cache none"):
        probe(*arguments, dataclasses.replace(SMALL, cache="device"), cache_folder=tmp_path)


def test_the_published_protocol_reports_each_heads_best_epoch() -> None:
    # With a learning rate this high, recall rises and falls from epoch to epoch.
    config = ProbeConfig(
        heads=("linear", "transformer"), epochs=6, batch=8, lr=0.5, final_lr=0.5, warmup_steps=0, seeds=2
    )
    arguments = fake_backbone(), Colours(40, "train"), Colours(30, "val")
    best = probe_heads(*arguments, dataclasses.replace(config, protocol="published"))
    last = probe_heads(*arguments, config)
    epochs = set()
    metrics: Any
    for ours, theirs in zip(best, last, strict=True):
        assert ours.outcome["protocol"] == "published"
        for head, tasks in ours.outcome["results"]["val"].items():
            for task, metrics in tasks.items():
                final: Any = theirs.outcome["results"]["val"][head][task]
                assert metrics["macro_recall"] >= final["macro_recall"]
                epochs.add(metrics["best_epoch"])
                if metrics["best_epoch"] == 6:
                    assert metrics["class_recall"] == final["class_recall"]
    assert epochs <= set(range(1, 7))
    assert len(epochs) > 1
    # The returned heads are the heads of the reported epochs.
    chosen = best[0].outcome["results"]["val"]["linear"]["local"]
    if chosen["best_epoch"] != 6:
        ours_best, ours_last = (p.trained.heads[LOCAL].state_dict() for p in (best[0], last[0]))
        assert not torch.equal(ours_best["function.weight"], ours_last["function.weight"])
    with pytest.raises(UserError, match="give one source to evaluate on"):
        probe(
            *arguments[:2],
            {"a": arguments[2], "b": arguments[2]},
            dataclasses.replace(config, protocol="published"),
        )


def test_probe_with_an_attribute_table_and_kinds_of_classes() -> None:
    table = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1]], dtype=bool)

    def labelled(length: int, split: str) -> AttributeLabels:
        source = AttributeLabels(Colours(length, split), ("ground", "warm", "mixed"), table)
        source.class_kinds = ("other", "thing", "stuff")
        return source

    config = dataclasses.replace(CONFIG, heads=("linear",), tasks=("local",))
    (result,) = probe(fake_backbone(), labelled(80, "train"), labelled(40, "val"), config)
    assert len(figures(result)["class_recall"]) == 3
    assert figures(result)["macro_recall"] > 0.9
    assert result["class_kinds"] == ["other", "thing", "stuff"]


def test_what_cannot_be_probed_is_refused_before_features_are_made() -> None:
    other = Colours(4, "val")
    other.classes = ("unlabeled", "other")
    empty = Colours(6, "val", codes=1)
    for source, said in (
        (other, "the classes of the source 'val' differ"),
        (
            empty,
            r"no image of the source 'val' \(6 images\) has a positive label: all pixels are 'unlabeled'",
        ),
        ({}, "needs a source"),
    ):
        backbone = fake_backbone()
        with pytest.raises(UserError, match=said):
            probe(backbone, Colours(40, "train"), source, SMALL)
        assert backbone.forwards == 0
    backbone = fake_backbone()
    with pytest.raises(UserError, match="'train'"):
        probe(backbone, empty, Colours(4, "val"), SMALL)
    with pytest.raises(UserError, match="shorter than the training"):
        probe(backbone, Colours(40, "train"), Colours(4, "val"), dataclasses.replace(SMALL, warmup_steps=12))
    assert backbone.forwards == 0


def test_replicates_are_handed_out_for_comparisons() -> None:
    config = dataclasses.replace(SMALL, lr=1e-2, final_lr=1e-3)
    (first,) = probe_heads(fake_backbone(), Colours(40, "train"), Colours(20, "val"), config)
    (again,) = probe_heads(fake_backbone(), Colours(40, "train"), Colours(20, "val"), config)
    spec = HeadSpec("linear", "global")  # neither 0 nor 1 after these steps
    recalls = first.recalls["val", spec]
    assert recalls.shape == (1000,)
    assert torch.equal(recalls, again.recalls["val", spec])
    metrics: Any = first.outcome["results"]["val"]["linear"]["global"]
    low, high = metrics["macro_recall_interval"]
    assert (recalls < low).double().mean() == pytest.approx(0.025, abs=0.003)
    assert (recalls > high).double().mean() == pytest.approx(0.025, abs=0.003)
