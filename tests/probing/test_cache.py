"""A disk cache has complete shards only, belongs to one backbone and one data set, and names its size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from probing_toys import ALONE, Colours, fake_backbone, toy
from safetensors.torch import load_file

from localign.backbones.preprocessing import Preprocessing
from localign.errors import UserError
from localign.probing import PackedLabels, PatchLabels, cache
from localign.probing.cache import DiskFeatures, cache_key, extract_to_disk
from localign.probing.features import Extraction, LiveFeatures


class Cut(Exception):
    """Stands for an interruption."""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight images per shard. Each has 5 tokens of 16 bfloat16 numbers, 5 bytes of flags 4 majorities: 173 bytes."""
    monkeypatch.setattr(cache, "SHARD_BYTES", 8 * 173)


def extraction(seed: int = 0, source: Any = None, **options: Any) -> Extraction:
    values: dict[str, Any] = {
        "backbone": fake_backbone(seed).eval(), "sha256": f"{seed}" * 64, "source": source or Colours(20, "train"),
        "dtype": torch.bfloat16, "autocast": False, "batch": 4, "workers": 0, "context": ALONE,
    }  # fmt: skip
    return Extraction(**{**values, **options})


def made(folder: Path, what: Extraction, *, replacing: bool = False) -> DiskFeatures:
    return extract_to_disk(what, folder, replace=replacing, on_progress=lambda done, total: None)


def test_rows_come_back_as_the_backbone_gave_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    what = extraction()
    features = made(tmp_path / "c", what)
    assert sorted(p.name for p in (tmp_path / "c").iterdir() if p.name != ".lock") == [
        "cache.json", "shard-00000.safetensors", "shard-00001.safetensors", "shard-00002.safetensors",
    ]  # fmt: skip
    assert load_file(tmp_path / "c" / "shard-00000.safetensors")["features"].dtype == torch.bfloat16
    rows = [np.array([19, 0, 7, 8]), np.array([3]), np.array([], dtype=np.int64)]
    live = LiveFeatures(what)
    for (tokens, labels), wanted in zip(features.batches(rows), rows, strict=True):
        assert len(tokens) == len(wanted)
        if len(wanted):
            expected, targets = next(live.batches([wanted]))
            assert torch.equal(tokens, expected.bfloat16())
            for name in ("patch", "image", "majority"):
                assert torch.equal(getattr(labels, name), getattr(targets, name)), name
    assert "writing 0.0 MiB of features" in capsys.readouterr().err


def test_a_whole_cache_is_used_again_without_a_forward_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path, extraction())
    capsys.readouterr()
    again = extraction()
    made(tmp_path, again)
    assert again.backbone.forwards == 0
    assert capsys.readouterr().err == ""


def test_a_cut_off_extraction_is_continued(tmp_path: Path) -> None:
    class Broken(Colours):
        def load_labelled(self, index: int) -> Any:
            if index == 14:
                raise Cut
            return super().load_labelled(index)

    with pytest.raises(Cut):
        made(tmp_path, extraction(source=Broken(20, "train")))
    assert sorted(p.name for p in tmp_path.glob("*shard*")) == ["shard-00000.safetensors"]
    (tmp_path / ".shard-00001.safetensors.77.tmp").write_bytes(b"of a process that was killed")
    rest = extraction()
    features = made(tmp_path, rest)
    assert rest.backbone.forwards == 12
    assert not list(tmp_path.glob(".shard*"))
    (tokens, _), *_ = features.batches([np.arange(20)])
    expected, _ = next(LiveFeatures(rest).batches([np.arange(20)]))
    assert torch.equal(tokens, expected.bfloat16())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"seed": 1}, "of another backbone (000000000000, not 111111111111)"),
        ({"source": Colours(20, "other")}, "of other data (train20, not other20)"),
        ({"dtype": torch.float32}, "made with other settings (dtype bfloat16, not float32)"),
        ({"autocast": True}, "made with other settings (autocast False, not True)"),
    ],
)
def test_another_backbones_cache_is_refused_or_replaced(
    tmp_path: Path, other: dict[str, Any], said: str
) -> None:
    made(tmp_path / "c", extraction())
    what = extraction(**other)
    with pytest.raises(UserError) as caught:
        made(tmp_path / "c", what)
    assert str(caught.value) == f"{tmp_path / 'c'} holds features {said}; give another --cache-dir"
    made(tmp_path / "c", what, replacing=True)
    assert what.backbone.forwards == 20
    made(tmp_path / "c", extraction(**other))


def test_other_geometry_is_another_cache(tmp_path: Path) -> None:
    made(tmp_path, extraction())
    what = extraction()
    backbone: Any = what.backbone
    backbone.image_size = (12, 12)
    with pytest.raises(UserError, match=r"image_size \[8, 8\], not \[12, 12\]"):
        made(tmp_path, what)


def test_folders_of_something_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("x")
    for replacing in (False, True):
        with pytest.raises(UserError, match="is not a feature cache"):
            made(tmp_path, extraction(), replacing=replacing)
    (tmp_path / "cache.json").write_text("{}")
    with pytest.raises(UserError, match="was not written by localign"):
        made(tmp_path, extraction(), replacing=True)
    assert (tmp_path / "precious.txt").is_file()


def test_a_full_disk_is_found_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SPARE_BYTES", 2**62)
    what = extraction()
    with pytest.raises(UserError, match=r"the features need 0\.0 MiB .* free; give another --cache-dir"):
        made(tmp_path, what)
    assert what.backbone.forwards == 0


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    made(tmp_path, extraction())
    shard = tmp_path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match=r"shard-00001\.safetensors is damaged .*; delete it"):
        made(tmp_path, extraction())
    shard.unlink()
    made(tmp_path, extraction())


def test_the_key_names_what_decides_the_features(tmp_path: Path) -> None:
    made(tmp_path, extraction())
    key = json.loads((tmp_path / "cache.json").read_text())["key"]
    assert {"backbone", "data", "image_size", "patch_size", "layer", "dtype"} <= set(key)
    assert "interpolation" not in key  # caches of models that state no filter stay valid
    stated = extraction()
    stated.backbone.preprocessing = Preprocessing("lanczos")
    assert cache_key(stated) == {**key, "interpolation": "lanczos"}


def test_targets_survive_packing() -> None:
    for classes in (1, 7, 8, 9, 183):
        generator = torch.Generator().manual_seed(classes)
        patch = torch.rand(3, 4, classes, generator=generator) < 0.3
        labels = PatchLabels(patch, patch.any(1), torch.randint(0, 300, (3, 4), generator=generator), 300)
        packed = PackedLabels.pack(labels)
        assert packed.patch.shape == (3, 4, -(-classes // 8))
        for name in ("patch", "image", "majority"):
            assert torch.equal(getattr(packed.unpack(torch.device("cpu")), name), getattr(labels, name)), name
    first, second = (PackedLabels.pack(toy(4, seed)[1]) for seed in (0, 1))
    joined = PackedLabels.cat([first, second])
    assert torch.equal(joined[4:].patch, second.patch)
    assert replace(joined, classes=1).classes == 1
