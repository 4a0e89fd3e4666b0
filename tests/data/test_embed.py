"""Features in parquet files: equal to the backbone's own, read with pyarrow alone, whole or absent."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from localign.alignment.student import prepare_backbone
from localign.backbones import Backbone, create_backbone, save_backbone
from localign.cli import main
from localign.data.sources import open_source
from localign.data.transforms import EvalTransform
from localign.datatools import embed as embedding
from localign.datatools.embed import embed
from localign.files.output import EMBEDDING_KEY

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

NAME, KWARGS = "vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
MODEL = ["--backbone", NAME, "--weights", "none", "--model-kwargs", json.dumps(KWARGS)]
SMALL = [*MODEL, "--image-size", "16x32", "--device", "cpu"]
GRID, WIDTH = (2, 4), 24


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return create_backbone(NAME, weights="none", image_size=(16, 32), model_kwargs=KWARGS)


def embedded(images: Path | str, out: Path, *options: str) -> Any:
    assert main(["embed", str(images), *SMALL, "--out", str(out), *options]) == 0
    return pq.read_table(out)


def array_of(table: Any, column: str) -> np.ndarray[Any, Any]:
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table[column].chunks]
    return np.concatenate(chunks).reshape(len(table), -1)


@pytest.mark.parametrize("form", ["pictures", "shards", "rows", "mixture"])
def test_rows_are_the_backbones_own_features(
    form: str, tmp_path: Path, request: pytest.FixtureRequest, backbone: Backbone
) -> None:
    images = request.getfixturevalue(form)
    table = embedded(images, tmp_path / "f.parquet", "--patches", "--dtype", "float32", "--batch-size", "5")
    source = open_source(str(images), image_size=backbone.image_size, scaled_decode=False)
    assert table["index"].to_pylist() == list(range(len(source)))
    assert table["key"].to_pylist() == [source.name(i) for i in range(len(source))]
    transform = EvalTransform(backbone.image_size)
    pixels = backbone.normalise(torch.stack([transform(source.load(i)) for i in range(len(source))]))
    with torch.no_grad():
        pooled, tokens = backbone.pooled(pixels), backbone.tokens(pixels)
    assert np.allclose(array_of(table, "pooled"), pooled.numpy(), atol=1e-5)
    patches = array_of(table, "patches").reshape(-1, GRID[0] * GRID[1], WIDTH)
    assert np.allclose(patches, tokens[:, backbone.num_prefix_tokens :].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        (NAME, {"global_pool": "avg", "fc_norm": True}),
        ("vit_base_patch16_siglip_224", {}),
        ("vit_small_patch14_reg4_dinov2", {"patch_size": 8}),
        ("eva02_tiny_patch14_224", {"patch_size": 8}),
        ("beit_base_patch16_224", {"patch_size": 8}),
        ("vit_small_patch16_dinov3", {"patch_size": 8}),
    ],
)
def test_one_pass_gives_what_two_give(name: str, kwargs: dict[str, Any]) -> None:
    small = {"embed_dim": 24, "depth": 2, "num_heads": 2, **kwargs}
    backbone = create_backbone(name, weights="none", image_size=32, model_kwargs=small)
    if kwargs.get("fc_norm"):
        backbone.final_norm = "fc_norm"
    images = torch.randint(
        0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    found = embed(backbone, images)
    with torch.no_grad():
        pixels = backbone.normalise(images)
        assert torch.allclose(found["pooled"], backbone.pooled(pixels), atol=1e-6)
        patches = backbone.tokens(pixels)[:, backbone.num_prefix_tokens :]
        assert torch.allclose(found["patches"], patches, atol=1e-6)


def test_types_and_facts_are_in_the_file(pictures: Path, tmp_path: Path, backbone: Backbone) -> None:
    table = embedded(pictures, tmp_path / "f.parquet", "--patches")
    assert table.schema.field("pooled").type == pa.list_(pa.float32(), WIDTH)
    assert table.schema.field("patches").type == pa.list_(pa.float16(), GRID[0] * GRID[1] * WIDTH)
    facts = json.loads(table.schema.metadata[b"localign_embed"])
    assert (facts["image_size"], facts["grid"], facts["width"]) == ([16, 32], list(GRID), WIDTH)
    assert facts["backbone"] == NAME
    file = pq.ParquetFile(tmp_path / "f.parquet")
    assert json.loads(file.metadata.metadata[b"unreadable"]) == {"count": 0, "named": []}
    assert "patches" not in embedded(pictures, tmp_path / "g.parquet").schema.names


def test_workers_and_row_groups_change_no_feature(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = embedded(pictures, tmp_path / "a.parquet", "--batch-size", "4")
    embedded(pictures, tmp_path / "b.parquet", "--batch-size", "4", "--workers", "2")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    monkeypatch.setattr(embedding, "_GROUP_BYTES", 6 * WIDTH * 4)
    two = embedded(pictures, tmp_path / "c.parquet", "--batch-size", "4")
    assert one.equals(two)
    groups = pq.ParquetFile(tmp_path / "c.parquet").metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [8, 8, 7]


def test_unreadable_images_are_skipped_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (20, 20), (200, 0, 0)).save(folder / "b.png")
    Image.new("RGB", (20, 20)).save(folder / os.fsdecode(b"c\xff.png"))
    (folder / "a\x1b.png").write_bytes(b"no image")
    out = tmp_path / "f.parquet"
    table = embedded(folder, out)
    assert table["index"].to_pylist() == [1, 2]
    assert table["key"].to_pylist() == ["b.png", "c\\udcff.png"]
    shown = capsys.readouterr().out
    assert "skipped    1 unreadable images\n           a\\x1b.png: " in shown
    said = json.loads(pq.ParquetFile(out).metadata.metadata[b"unreadable"])
    assert (said["count"], said["named"][0][0]) == (1, "a\x1b.png")
    before = out.read_bytes()
    (folder / "b.png").write_bytes(b"gone")
    (folder / os.fsdecode(b"c\xff.png")).write_bytes(b"gone")
    assert main(["embed", str(folder), *SMALL, "--out", str(out)]) == 2
    assert "none of the 3 images of" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.parquet", "images"]


def test_own_files_are_replaced_and_those_of_others_stay(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "f.parquet"
    first = embedded(pictures, out)
    assert embedded(pictures, out).equals(first)
    pq.write_table(pa.table({"x": [1]}), out)
    before = out.read_bytes()
    assert main(["embed", str(pictures), *SMALL, "--out", str(out)]) == 2
    assert "`localign embed` did not write it" in capsys.readouterr().err
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("value", "options", "said"),
    [
        (float("nan"), ["--patches"], "the pooled feature of cat/00.jpg is not a number"),
        (1e6, ["--patches"], "the patches feature of cat/00.jpg does not fit float16; give --dtype float32"),
    ],
)
def test_features_that_are_no_numbers_of_the_type_are_one_line(
    value: float,
    options: list[str],
    said: str,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def scaled(*arguments: Any, **keywords: Any) -> dict[str, torch.Tensor]:
        return {name: tensor.abs() + value for name, tensor in embed(*arguments, **keywords).items()}

    monkeypatch.setattr(embedding, "embed", scaled)
    assert main(["embed", str(pictures), *SMALL, "--out", str(tmp_path / "f.parquet"), *options]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batch-size", "0"], "--batch-size must be above 0, not 0"),
        (["--workers", "-1"], "--workers must not be negative, not -1"),
        (["--dtype", "float32"], "--dtype has no effect without --patches"),
        (["--image-size", "4"], "has patches of 8 pixels, more than an image size of 4"),
        (["--device", "tpu"], "device"),
        (["--field", "jpg"], "--field applies to tar shards and parquet files"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(
    options: list[str], said: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["embed", str(pictures), *SMALL, "--out", str(tmp_path / "f.parquet"), *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_one_line(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["embed", str(pictures), *SMALL, "--out", str(tmp_path / "f.parquet")]
    assert main(["embed", str(pictures)]) == 2
    assert "embed needs images and --backbone NAME" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command) == 2
    assert "start it without torchrun" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert main(command) == 2
    assert "pip install 'localign[parquet]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [("vit_tiny_patch16_224", "class token"), ("vit_base_patch16_siglip_224", "mean of patches")],
)
@torch.no_grad()
def test_an_aligned_model_has_no_pooling_of_its_own(
    name: str, kind: str, pictures: Path, tmp_path: Path
) -> None:
    kwargs = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    plain = create_backbone(name, weights="none", image_size=32, model_kwargs=kwargs)
    export = save_backbone(prepare_backbone(plain.copy()), tmp_path / "export")
    out = tmp_path / "aligned.parquet"
    command = ["embed", str(pictures), "--backbone", str(export), "--out", str(out)]
    assert main([*command, "--patches", "--dtype", "float32"]) == 0
    table = pq.read_table(out)
    facts = json.loads(table.schema.metadata[EMBEDDING_KEY.encode()])
    assert facts["pooling"] == kind
    pooled = np.stack(table["pooled"].to_pylist())
    assert pooled.shape == (len(table), 48)
    if kind == "mean of patches":
        patches = np.stack(table["patches"].to_pylist()).reshape(len(table), -1, 48)
        assert np.allclose(pooled, patches.mean(axis=1), atol=1e-5)
    else:
        source, transform = open_source(str(pictures), image_size=(32, 32)), EvalTransform((32, 32))
        backbone = create_backbone(export)
        tokens = backbone.tokens(backbone.normalise(transform(source.load(0))[None]))
        assert np.allclose(pooled[0], tokens[0, 0].numpy(), atol=1e-5)
