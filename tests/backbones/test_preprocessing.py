"""Images resized as the model's folder states: equal to transformers' and timm's own pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.data
import torch
import transformers
from foreign_folders import PATCH, SIZE, folder_of, timm_folder
from PIL import Image
from torch import Tensor

from localign.backbones import Backbone, create_backbone, load_backbone, save_backbone
from localign.backbones.families.writing import save_transformers
from localign.backbones.preprocessing import UNSTATED, Preprocessing
from localign.data.transforms import EvalTransform
from localign.errors import UserError
from localign.vlm.data.images import ImageTransform

_TIMM: Any = timm.data  # without types
SIDES = {"height": SIZE, "width": SIZE}
CROPPED = {"do_center_crop": True, "crop_size": SIDES, "size": {"shortest_edge": 36}}
PROCESSORS: dict[str, tuple[str, str, dict[str, Any], Preprocessing]] = {
    "clip": ("clip", "CLIPImageProcessor", {"size": {"shortest_edge": SIZE}, "crop_size": SIDES},
             Preprocessing("bicubic", 1.0, "center")),
    "clip, bilinear": ("clip", "CLIPImageProcessor", {**CROPPED, "resample": 2},
                       Preprocessing("bilinear", SIZE / 36, "center")),
    "siglip": ("siglip", "SiglipImageProcessor", {"size": SIDES}, Preprocessing("bicubic", None, "squash")),
    "siglip, fixed siglip 2": ("siglip", "SiglipImageProcessor", {"size": SIDES, "resample": 2},
                               Preprocessing("bilinear", None, "squash")),
    "dinov2": ("dinov2", "BitImageProcessor", CROPPED, Preprocessing("bicubic", SIZE / 36, "center")),
    "dinov3": ("dinov3", "DINOv3ViTImageProcessorFast", {"size": SIDES}, Preprocessing("bilinear", None, "squash")),
    "vit": ("vit", "ViTImageProcessor", {"size": SIDES}, Preprocessing("bilinear", None, "squash")),
    "vit, nearest": ("vit", "ViTImageProcessor", {"size": SIDES, "resample": 0},
                     Preprocessing("nearest", None, "squash")),
    "vit, cropped": ("vit", "ViTImageProcessor", CROPPED, Preprocessing("bilinear", SIZE / 36, "center")),
}  # fmt: skip


def photograph(width: int = 87, height: int = 61) -> Image.Image:
    """Smooth shading, edges and fine texture."""
    y, x = np.mgrid[0:height, 0:width] / 30
    shade = np.stack([np.sin(x + y), np.cos(2 * x - y), np.sin(x * y)], -1) * 70 + 128
    shade[15:40, 20:50] += 50
    noise = np.random.default_rng(0).normal(0, 12, shade.shape)
    return Image.fromarray((shade + noise).clip(0, 255).astype(np.uint8))


def folder_with(case: str, folder: Path) -> Path:
    name, kind, options, _ = PROCESSORS[case]
    folder_of(name, folder)
    getattr(transformers, kind)(**options).save_pretrained(folder)
    return folder


def seen(folder: Path, image: Image.Image) -> Tensor:
    """The pixels, 0..255, that transformers' own processor gives the model."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
    mean, std = (torch.tensor(getattr(processor, n)).view(3, 1, 1) for n in ("image_mean", "image_std"))
    return (pixels * std + mean) * 255


def view(backbone: Backbone) -> EvalTransform:
    return EvalTransform(backbone.image_size, preprocessing=backbone.preprocessing)


def assert_same_picture(ours: Tensor, theirs: Tensor) -> None:
    """Pillow and torchvision round between the two passes of a resize."""
    difference = (ours.float() - theirs).abs()
    assert difference.max() <= 2.01
    assert difference.mean() < 0.4


@pytest.mark.parametrize("case", PROCESSORS)
@pytest.mark.parametrize("shape", [(87, 61), (61, 88), (40, 40)])
def test_the_picture_equals_transformers(case: str, shape: tuple[int, int], tmp_path: Path) -> None:
    backbone = create_backbone(folder_with(case, tmp_path))
    assert backbone.preprocessing == PROCESSORS[case][3]
    image = photograph(*shape)
    assert_same_picture(view(backbone)(image), seen(tmp_path, image))


def test_the_test_sees_a_wrong_filter_and_a_wrong_crop(tmp_path: Path) -> None:
    image = photograph()
    for case in ("vit", "dinov2"):
        theirs = seen(folder_with(case, tmp_path / case), image)
        with pytest.raises(AssertionError):
            assert_same_picture(EvalTransform(SIZE)(image), theirs)


@pytest.mark.parametrize("case", PROCESSORS)
def test_written_out_again_it_is_the_same_picture(case: str, tmp_path: Path) -> None:
    backbone = create_backbone(folder_with(case, tmp_path / "in"))
    (tmp_path / "out").mkdir()
    save_transformers(backbone, tmp_path / "out", PROCESSORS[case][0])
    assert (
        create_backbone(tmp_path / "out").preprocessing.stated().items()
        >= backbone.preprocessing.stated().items()
    )
    assert_same_picture(view(backbone)(photograph()), seen(tmp_path / "out", photograph()))


def test_exports_keep_what_was_stated(tmp_path: Path) -> None:
    backbone = create_backbone(folder_with("clip, bilinear", tmp_path / "in"))
    folder = save_backbone(backbone, tmp_path / "out")
    assert load_backbone(folder).preprocessing == backbone.preprocessing
    config = _TIMM.resolve_data_config(model=timm.create_model(f"local-dir:{folder}"))
    assert (config["interpolation"], config["crop_pct"], config["crop_mode"]) == (
        "bilinear",
        SIZE / 36,
        "center",
    )


def test_what_says_nothing_is_resized_as_before(tmp_path: Path) -> None:
    silent = [
        create_backbone("vit_tiny_patch16_224", weights="none", image_size=32, model_kwargs={"depth": 1}),
        create_backbone(folder_of("dinov2", tmp_path / "tower")[1]),
        create_backbone("scenes-vit"),
    ]
    for backbone in silent:
        assert backbone.preprocessing == UNSTATED
    written = json.loads((save_backbone(silent[0], tmp_path / "out") / "config.json").read_text())
    assert set(written["pretrained_cfg"]) == {"input_size", "mean", "std", "num_classes", "fixed_input_size"}


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_folder_of_timm(crop_mode: str, prefix: str, tmp_path: Path) -> None:
    folder = timm_folder(tmp_path, num_classes=0)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    stated: dict[str, Any] = {"interpolation": "bilinear", "crop_pct": 0.875, "crop_mode": crop_mode}
    path.write_text(json.dumps({**config, "pretrained_cfg": {**config["pretrained_cfg"], **stated}}))
    backbone = create_backbone(f"{prefix}{folder}")
    assert backbone.preprocessing == Preprocessing(**stated)
    theirs: Any = _TIMM.create_transform(32, interpolation="bilinear", crop_pct=0.875, crop_mode=crop_mode,
                                             mean=(0, 0, 0), std=(1, 1, 1))  # fmt: skip
    image = photograph(89, 61)  # the rest is even; timm crops half an odd one differently from transformers
    difference = (view(backbone)(image) - 255 * theirs(image)).abs()
    assert difference.max() < 1e-3


def test_the_filter_is_the_benchmarks_and_the_language_models(tmp_path: Path) -> None:
    image, stated = photograph(), Preprocessing("nearest", 0.5, "center")
    ours = EvalTransform(30, "square", stated)(image)
    nearest = image.crop((13, 0, 74, 61)).resize((30, 30), Image.Resampling.NEAREST)
    assert torch.equal(ours, torch.from_numpy(np.array(nearest)).permute(2, 0, 1))
    for resize in ("naive", "letterbox", "crop"):
        plain, lanczos = (
            ImageTransform((30, 30), resize, (0.5, 0.5, 0.5), *filters)(image)
            for filters in ((), ("lanczos",))
        )
        assert not torch.equal(plain, lanczos)
        assert (plain.float() - lanczos.float()).abs().mean() < 6


def test_another_size_keeps_the_share_of_the_crop(tmp_path: Path) -> None:
    backbone = create_backbone(folder_with("dinov2", tmp_path), image_size=(4 * PATCH, 9 * PATCH))
    assert view(backbone)(photograph()).shape == (3, 32, 72)


@pytest.mark.parametrize(
    "content",
    [
        {}, {"size": 224}, {"size": {"shortest_edge": 32}}, {"size": {"longest_edge": 32}},
        {"do_center_crop": True, "size": {"shortest_edge": 20}, "crop_size": 32},
        {"do_center_crop": True, "size": {"shortest_edge": "x"}, "crop_size": [1]},
        {"do_center_crop": True, "size": {"shortest_edge": 0}, "crop_size": 0},
        {"do_resize": False, "size": SIDES}, {"do_center_crop": True, "size": SIDES},
    ],
)  # fmt: skip
def test_sizes_that_state_no_crop(content: dict[str, Any]) -> None:
    assert Preprocessing.of_transformers({**content, "resample": 1}, "x") == Preprocessing("lanczos")


@pytest.mark.parametrize("resample", [6, -1, "bicubic", 2.0, True, [3]])
def test_an_unknown_filter_is_one_line(resample: Any, tmp_path: Path) -> None:
    _, folder = folder_of("clip", tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps({"resample": resample}))
    with pytest.raises(
        UserError, match=r"preprocessor_config.json: resample is .*, not one of Pillow's filters 0..5"
    ):
        create_backbone(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("interpolation", "sinc"), ("interpolation", 3), ("crop_pct", 0), ("crop_pct", 1.5), ("crop_pct", "x"),
     ("crop_pct", True), ("crop_mode", "left"), ("crop_mode", [1])],
)  # fmt: skip
def test_a_damaged_export_is_one_line(key: str, value: Any, tmp_path: Path) -> None:
    backbone = create_backbone(
        "vit_tiny_patch16_224", weights="none", image_size=32, model_kwargs={"depth": 1}
    )
    path = save_backbone(backbone, tmp_path) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "pretrained_cfg": {**config["pretrained_cfg"], key: value}}))
    with pytest.raises(UserError, match=r"config\.json: .*(filter|crop_pct|crop_mode)") as raised:
        load_backbone(tmp_path)
    assert "\n" not in str(raised.value)


SIZES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "a crop": (
        {"do_center_crop": True, "crop_size": {"height": 16, "width": 24}, "size": {"shortest_edge": 48}},
        (16, 24),
    ),
    "a crop of one side": ({"do_center_crop": True, "crop_size": 16, "size": 48}, (16, 16)),
    "a size": ({"size": {"height": 48, "width": 40}}, (48, 40)),
    "inside a processor": ({"image_processor": {"size": {"height": 16, "width": 16}}}, (16, 16)),
    "not of whole patches": ({"size": {"height": 20, "width": 20}}, (32, 32)),
    "the shorter side alone": ({"size": {"shortest_edge": 48}}, (32, 32)),
    "nothing": ({}, (32, 32)),
    "nonsense": ({"size": {"height": "tall", "width": -8}}, (32, 32)),
}


@pytest.mark.parametrize("case", SIZES)
@torch.no_grad()
def test_the_image_processor_says_the_size(case: str, tmp_path: Path) -> None:
    content, expected = SIZES[case]
    model, folder = folder_of("dinov2", tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    backbone = create_backbone(folder)
    assert backbone.image_size == expected
    pixels = torch.randn(1, 3, *expected, generator=torch.Generator().manual_seed(1))
    theirs = model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(backbone.tokens(pixels), theirs, atol=1e-5, rtol=1e-5)
    assert create_backbone(folder, image_size=40).image_size == (40, 40)


def test_an_image_processor_that_is_no_object_is_one_line(tmp_path: Path) -> None:
    _, folder = folder_of("dinov2", tmp_path)
    (folder / "preprocessor_config.json").write_text('{"image_processor": 3}')
    with pytest.raises(UserError, match=r"image_processor is no object$"):
        create_backbone(folder)
