"""The features that a disk cache gives back are those that were written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cache import extraction, made

from localign.errors import UserError
from localign.probing import cache


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SHARD_BYTES", 8 * 173)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made(tmp_path / "c", extraction())
    return tmp_path / "c"


def shard_of(folder: Path) -> Path:
    return folder / "shard-00001.safetensors"


def refused(folder: Path, *words: str) -> None:
    what = extraction()
    with pytest.raises(UserError) as caught:
        made(folder, what)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line
    assert what.backbone.forwards == 0


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], *, digest: bool = True) -> None:
    """Change the tensors of a shard; ``digest`` keeps the header's digest of the old ones."""
    with safe_open(shard_of(folder), framework="pt") as file:
        metadata = file.metadata() if digest else None
    tensors = {name: tensor.clone() for name, tensor in load_file(shard_of(folder)).items()}
    change(tensors)
    save_file(tensors, shard_of(folder), metadata=metadata)


def as_old(folder: Path) -> None:
    """Make the cache one of a version without digests."""
    header = json.loads((folder / "cache.json").read_text())
    del header["digests"]
    (folder / "cache.json").write_text(json.dumps(header))
    for shard in folder.glob("shard-*"):
        save_file(load_file(shard), shard)


@pytest.mark.parametrize("seed", range(5))
def test_flipped_bytes_are_refused(folder: Path, seed: int) -> None:
    content = np.frombuffer(shard_of(folder).read_bytes(), dtype=np.uint8).copy()
    start = [0, 8, 300, len(content) - 1, len(content) // 2][seed]
    places = np.random.default_rng(seed).integers(start, len(content), 1 if seed > 2 else 200)
    content[places] ^= 0x11
    shard_of(folder).write_bytes(content.tobytes())
    refused(folder, "shard-00001.safetensors is damaged", "delete it")
    shard_of(folder).unlink()
    made(folder, extraction())


def swap_rows(tensors: dict[str, torch.Tensor]) -> None:
    tensors["features"] = tensors["features"].flip(0)


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["features"][0, 0, 0] = float("nan")


def infinity(tensors: dict[str, torch.Tensor]) -> None:
    tensors["features"][-1, -1, -1] = float("inf")


def other_label(tensors: dict[str, torch.Tensor]) -> None:
    tensors["majority"][0, 0] += 1


def other_dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors["features"] = tensors["features"].double()


def fewer_rows(tensors: dict[str, torch.Tensor]) -> None:
    tensors["features"] = tensors["features"][1:]


def lost_tensor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["features"]


def more_tensors(tensors: dict[str, torch.Tensor]) -> None:
    tensors["more"] = torch.zeros(1)


@pytest.mark.parametrize(
    "change", [swap_rows, nan, infinity, other_label, other_dtype, fewer_rows, lost_tensor, more_tensors]
)
def test_a_changed_shard_is_refused(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    rewrite(folder, change)
    refused(folder, "shard-00001.safetensors is damaged")


def test_a_shard_without_a_digest_is_refused(folder: Path) -> None:
    rewrite(folder, lambda tensors: None, digest=False)
    refused(folder, "its digest differs")


def test_an_old_cache_without_digests_is_read(folder: Path) -> None:
    as_old(folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    what = extraction()
    made(folder, what)
    assert what.backbone.forwards == 0
    assert {path.name: path.read_bytes() for path in folder.glob("*.*")} == before


@pytest.mark.parametrize("change", [nan, infinity, other_dtype, fewer_rows, lost_tensor])
def test_an_old_cache_with_impossible_features_is_refused(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]
) -> None:
    as_old(folder)
    rewrite(folder, change)
    refused(folder, "shard-00001.safetensors is damaged")


@pytest.mark.parametrize(
    "header",
    [
        "[]", "{}", "{", "", "[" * 100_000, '{"key": {}}', '{"key": {}, "shard_images": 0}',
        '{"key": {}, "shard_images": "8"}', '{"key": {}, "shard_images": 1e300}',
        '{"key": [], "shard_images": 8}', '{"key": {}, "shard_images": -8}', '{"key": {}, "shard_images": true}',
    ],
)  # fmt: skip
def test_a_header_with_wrong_types_is_one_line(folder: Path, header: str) -> None:
    (folder / "cache.json").write_text(header)
    refused(folder, "cache.json")
