"""What an export folder holds is verified when it is written and when it is read back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from localign.alignment.export import export_student, load_student
from localign.alignment.student import Decoder, DecoderConfig, Encoder, Student, prepare_backbone
from localign.backbones import Backbone, create_backbone, load_backbone, save_backbone
from localign.backbones.export import content_hash
from localign.errors import UserError
from localign.finetuning.model import ImageClassifier, export_classifier, load_classifier

TINY: dict[str, Any] = {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 16}


def tiny() -> Backbone:
    return create_backbone("vit_tiny_patch16_224", weights="none", image_size=32, model_kwargs=TINY)


def student() -> Student:
    backbone = prepare_backbone(tiny())
    config = DecoderConfig(width=16, output_width=16, num_heads=2, num_tokens=5, depth=1)
    return Student(Encoder(backbone, 16), Decoder(config))


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    return {
        "backbone": save_backbone(tiny(), folder / "backbone"),
        "student": export_student(student(), folder / "student"),
        "classifier": export_classifier(ImageClassifier(tiny(), ["a", "b"]), folder / "classifier"),
    }


LOADERS: dict[str, Callable[[Path], object]] = {
    "backbone": load_backbone, "student": load_student, "classifier": load_classifier,
}  # fmt: skip


def copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def one_line(call: Callable[[], object], *words: str) -> str:
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 1500
    for word in words:
        assert word in line, line
    return line


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("kind", "file"),
    [("backbone", "model"), ("student", "model"), ("student", "decoder"), ("classifier", "head")],
)
def test_two_hundred_flipped_bytes_are_one_line(
    exports: dict[str, Path], tmp_path: Path, kind: str, file: str, seed: int
) -> None:
    folder = copy(exports[kind], tmp_path / "x")
    path = folder / f"{file}.safetensors"
    content = np.frombuffer(path.read_bytes(), dtype=np.uint8).copy()
    start = 0 if seed == 0 else len(content) // 2  # header and values, or values alone
    places = np.random.default_rng(seed).integers(start, len(content), 200)
    content[places] ^= 0x41
    path.write_bytes(content.tobytes())
    one_line(lambda: LOADERS[kind](folder), path.name)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("share", ["all", "one"])
def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path, value: float, share: str) -> None:
    backbone = tiny()
    weight = backbone.vit.blocks[0].mlp.fc1.weight
    with torch.no_grad():
        weight.fill_(value) if share == "all" else weight[0, 0].fill_(value)
    one_line(lambda: save_backbone(backbone, tmp_path / "x"), "blocks.0.mlp.fc1.weight", "not exported")
    assert not (tmp_path / "x").exists()


def test_weights_too_large_for_the_storage_dtype_are_not_exported(tmp_path: Path) -> None:
    backbone = tiny()
    torch.nn.init.constant_(backbone.vit.cls_token, 1e6)
    one_line(lambda: save_backbone(backbone, tmp_path / "x", dtype=torch.float16), "cls_token")
    save_backbone(backbone, tmp_path / "x", dtype=torch.bfloat16)


@pytest.mark.parametrize("part", ["decoder", "head of the encoder", "classifier"])
def test_other_parts_that_are_not_finite_are_not_exported(tmp_path: Path, part: str) -> None:
    model: Any = ImageClassifier(tiny(), ["a", "b"]) if part == "classifier" else student()
    module = {"decoder": "decoder", "head of the encoder": "encoder", "classifier": "head"}[part]
    parameters = list(getattr(model, module).parameters())
    torch.nn.init.constant_(parameters[-1], math.nan)
    export: Any = export_classifier if part == "classifier" else export_student
    one_line(lambda: export(model, tmp_path / "x"), "not exported")
    assert not (tmp_path / "x").exists()


def test_an_old_export_with_nan_is_refused(exports: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(exports["backbone"], tmp_path / "x")
    state = load_file(folder / "model.safetensors")
    state["pos_embed"][0, 0, 0] = math.nan
    save_file(state, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["localign"]["sha256"] = content_hash(state)
    (folder / "config.json").write_text(json.dumps(config))
    one_line(lambda: load_backbone(folder), "pos_embed", "NaN")


STATISTICS: dict[str, Any] = {
    "nan": [math.nan, 0.5, 0.5], "infinite": [0.5, math.inf, 0.5], "two": [0.5, 0.5], "text": "abc",
    "words": ["a", "b", "c"], "none": None, "nested": [[0.5], [0.5], [0.5]],
    "huge": [10**400, 1, 1], "empty": [], "number": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize("case", STATISTICS)
def test_statistics_that_are_no_numbers_are_refused(
    exports: dict[str, Path], tmp_path: Path, case: str, name: str
) -> None:
    folder = copy(exports["backbone"], tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"][name] = STATISTICS[case]
    (folder / "config.json").write_text(json.dumps(config))
    one_line(lambda: load_backbone(folder), name)


@pytest.mark.parametrize("std", [(0.0, 0.2, 0.2), (0.2, -0.2, 0.2)])
def test_a_deviation_must_be_above_zero(std: tuple[float, ...]) -> None:
    one_line(lambda: Backbone(tiny().vit, name="x", architecture="x", std=std), "std", "above 0")


FIELDS: dict[str, Any] = {
    "architecture": 3, "model_args": [], "pretrained_cfg": "x", "localign.name": None, "localign.soft_cap": "30",
    "localign.final_norm": ["norm"], "localign.norm_eps": True, "localign.pooling": 0, "localign.decoder": "x",
    "localign.provenance": None, "localign.sha256": None, "localign.format": 2, "localign": [],
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_a_config_with_wrong_types_is_one_line(exports: dict[str, Path], tmp_path: Path, field: str) -> None:
    folder = copy(exports["student"], tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    section, _, key = field.rpartition(".")
    (config[section] if section else config)[key] = FIELDS[field]
    (folder / "config.json").write_text(json.dumps(config))
    one_line(lambda: load_student(folder), "config.json")


@pytest.mark.parametrize(
    "change",
    [
        {"classes": "ab"},
        {"classes": []},
        {"classes": [1]},
        {"multi_label": 1},
        {"sha256": None},
        {"sha256": "0" * 64},
    ],
)
def test_a_classifiers_section_with_wrong_types_is_one_line(
    exports: dict[str, Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = copy(exports["classifier"], tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    config["localign"]["classifier"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    one_line(lambda: load_classifier(folder), "is damaged")


HOSTILE: dict[str, tuple[str, Any]] = {
    "address of weights": ("model_args", {"pretrained_cfg": {"url": "http://127.0.0.1:9/x.pth"}}),
    "overlay": ("model_args", {"pretrained_cfg_overlay": {"hf_hub_id": "a/b"}}),
    "pickle": ("model_args", {"checkpoint_path": "/tmp/x.pth"}),
    "cache folder": ("model_args", {"cache_dir": "/tmp/x"}),
    "pretrained": ("model_args", {"pretrained": True}),
    "device": ("model_args", {"device": "cuda:9"}),
    "remote architecture": ("architecture", "hf-hub:timm/vit_tiny_patch16_224"),
    "folder as architecture": ("architecture", "local-dir:/tmp"),
    "no architecture": ("architecture", "vit_of_nobody"),
    "wide": ("model_args", {"embed_dim": 10**12}),
    "deep": ("model_args", {"depth": 10**9}),
    "wide within the bounds": ("model_args", {"embed_dim": 60_000, "num_heads": 6, "depth": 40}),
    "many tokens": ("model_args", {"img_size": 65_536, "patch_size": 1}),
    "no heads": ("model_args", {"num_heads": 0}),
    "no patch": ("model_args", {"patch_size": 0}),
    "negative": ("model_args", {"embed_dim": -16}),
    "text": ("model_args", {"embed_dim": "16"}),
    "list": ("model_args", {"depth": [1]}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_config_is_one_line(exports: dict[str, Path], tmp_path: Path, case: str) -> None:
    folder = copy(exports["backbone"], tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    key, value = HOSTILE[case]
    config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    one_line(lambda: load_backbone(folder))


@pytest.mark.parametrize(
    "change", [{"width": 10**9}, {"depth": 10**9}, {"num_heads": 0}, {"activation": "Nothing"}, {"hidden": 4}]
)
def test_a_hostile_decoder_is_one_line(
    exports: dict[str, Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = copy(exports["student"], tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    config["localign"]["decoder"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    one_line(lambda: load_student(folder))


LOCAL: dict[str, dict[str, Any]] = {
    "remote architecture": {"architecture": "hf-hub:timm/vit_tiny_patch16_224"},
    "no architecture": {"architecture": None},
    "pickle": {"model_args": {"checkpoint_path": "/tmp/x.pth"}},
    "overlay": {"model_args": {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/x.pth"}}},
    "huge": {"model_args": {"embed_dim": 10**12}},
    "deep": {"model_args": {"depth": 10**9}},
    "list": {"model_args": [1]},
    "code": {"pretrained_cfg": {"custom_load": "hf"}},
    "tensors": {"pretrained_cfg": {"state_dict": {"a": 1}}},
    "text": {"pretrained_cfg": "x"},
}


@pytest.mark.parametrize("case", LOCAL)
def test_a_hostile_folder_of_timm_is_one_line(
    exports: dict[str, Path], tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError(f"reached out: {arguments}")

    monkeypatch.setattr("socket.socket.connect", refuse)
    folder = copy(exports["backbone"], tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    for key, value in LOCAL[case].items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    one_line(lambda: create_backbone(f"local-dir:{folder}"), "config.json")


def test_a_folder_of_timm_is_read(exports: dict[str, Path]) -> None:
    backbone = create_backbone(f"local-dir:{exports['backbone']}")
    assert torch.equal(backbone.vit.pos_embed, load_backbone(exports["backbone"]).vit.pos_embed)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "unknown": {"model_kwargs": {"widht": 3}},
    "pickle": {"model_kwargs": {"checkpoint_path": "x.pth"}},
    "overlay": {"model_kwargs": {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:9"}}},
    "wide": {"model_kwargs": {"embed_dim": 1e12}},
    "not finite": {"model_kwargs": {"embed_dim": math.nan}},
    "memory": {"model_kwargs": {"embed_dim": 60_000, "num_heads": 6, "depth": 1000}},
    "image": {"image_size": 10**9},
    "tokens": {"image_size": 65_000, "model_kwargs": {"patch_size": 1}},
    "no patch": {"model_kwargs": {"patch_size": 0}},
    "no heads": {"model_kwargs": {"num_heads": 0}},
    "negative": {"image_size": -32},
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_absurd_arguments_are_one_line_before_memory_is_taken(case: str) -> None:
    one_line(lambda: create_backbone("vit_tiny_patch16_224", weights="none", **ARGUMENTS[case]))


@pytest.mark.parametrize(
    ("name", "size", "nearest"),
    [
        ("vit_small_patch16_dinov3", 100, "96 or 112"),
        ("vit_small_patch16_dinov3", (96, 100), "96 or 112"),
        ("vit_small_patch16_dinov3", 10, "16"),
        ("vit_small_patch14_dinov2", 224 + 3, "224 or 238"),
        ("vit_small_patch14_reg4_dinov2", (28, 30), "28 or 42"),
    ],
)
def test_a_size_that_the_patches_do_not_divide_is_one_line(name: str, size: Any, nearest: str) -> None:
    arguments = {"depth": 1, "embed_dim": 48, "num_heads": 3}
    try:
        backbone = create_backbone(name, weights="none", image_size=size, model_kwargs=arguments)
    except UserError as error:
        assert f"give --image-size {nearest}" in str(error)  # noqa: PT017
    else:
        with torch.no_grad():
            backbone.tokens(torch.zeros(1, 3, *backbone.image_size))  # such models cut the rest off
