"""A transformed sample is a pure function of (image, seed, position), and has the configured size."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from localign import rng
from localign.data.transforms import EvalTransform, TrainTransform, to_tensor
from localign.errors import UserError
from localign.options.names import TrainCrop


def picture(height: int = 90, width: int = 140) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    values = np.stack([rows * 255 // height, columns * 255 // width, (rows * columns) % 256], axis=-1)
    return Image.fromarray(values.astype(np.uint8))


@pytest.mark.parametrize("crop", ["published", "rkrc", "rrc", "none"])
@pytest.mark.parametrize("auto_augment", [None, "rand-m9-mstd0.5-inc1"])
@pytest.mark.parametrize("size", [32, (24, 40)])
def test_a_sample_is_a_function_of_seed_and_position(
    crop: TrainCrop, auto_augment: str | None, size: int | tuple[int, int]
) -> None:
    transform = TrainTransform(size, crop, auto_augment)
    image = picture()
    samples = [transform(image, 3, p) for p in range(12)]
    random.seed(99)
    torch.manual_seed(99)
    before = random.getstate(), torch.random.get_rng_state()
    again = [TrainTransform(size, crop, auto_augment)(image, 3, p) for p in reversed(range(12))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(samples, again, strict=True))
    assert random.getstate() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    assert samples[0].dtype == torch.uint8
    assert samples[0].shape == (3, *((size, size) if isinstance(size, int) else size))
    assert samples[0].is_contiguous()
    assert len({bytes(s.numpy()) for s in samples}) > 1
    assert not all(torch.equal(a, transform(image, 4, p)) for p, a in enumerate(samples))


RRC_RANGES = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)}
"""timm's defaults for a random resized crop, which the published runs pass to the mode rkrc."""


@pytest.mark.parametrize(
    ("crop", "mode", "auto_augment", "ranges"),
    [
        ("published", "rkrc", None, RRC_RANGES),
        ("published", "rkrc", "rand-m9-mstd0.5-inc1", RRC_RANGES),
        ("rkrc", "rkrc", None, {}),
        ("rrc", "rrc", None, {}),
    ],
)
def test_samples_equal_those_of_timm(
    crop: TrainCrop, mode: str, auto_augment: str | None, ranges: dict[str, Any]
) -> None:
    reference = create_transform(
        32,
        is_training=True,
        train_crop_mode=mode,
        interpolation="random",
        color_jitter=0.0,
        auto_augment=auto_augment,
        use_prefetcher=True,
        **ranges,
    )
    for position in range(60):
        with rng.seeded_globals(5, "transform", position):
            expected = torch.as_tensor(reference(picture()))
        assert torch.equal(TrainTransform(32, crop, auto_augment)(picture(), 5, position), expected)


def test_the_published_crop_zooms_and_stretches_half_of_the_images() -> None:
    """Read off from pictures whose levels are their coordinates: which part of the image a crop shows."""
    rows, columns = np.mgrid[0:256, 0:256]
    image = Image.fromarray(np.stack([rows, columns, rows], -1).astype(np.uint8))
    crop, heights, aspects = TrainTransform(64, "published", hflip=0.0), [], []
    for position in range(1500):
        sample = crop(image, 1, position).double()
        down, right = sample[0, 44, 32] - sample[0, 20, 32], sample[1, 32, 44] - sample[1, 32, 20]
        heights.append(float(down * right / 24**2) / 16)  # share of the area, from the slopes
        aspects.append(float(down / right))
    areas, ratios = np.array(heights), np.array(aspects)
    stretched = np.abs(np.log(ratios)) > np.log(1.05)
    expected = 0.5 * (1 - np.log(1.05) / np.log(4 / 3))
    assert abs(stretched.mean() - expected) < 0.05
    assert 0.7 < ratios.min() < 0.8
    assert 1.25 < ratios.max() < 1.42
    assert (areas < 0.9).mean() == pytest.approx(0.5 * (0.9 - 0.08) / 0.92, abs=0.05)
    assert (areas < 0.5).mean() == pytest.approx(0.5 * (0.5 - 0.08) / 0.92, abs=0.05)
    assert 0.06 < areas.min() < 0.12


def test_only_crops_that_never_magnify_take_images_decoded_at_reduced_size() -> None:
    from localign.data.sources import DECODE_HEADROOM
    from localign.data.transforms import CROP_RANGES

    scale, aspect = CROP_RANGES["rkrc"]
    assert (scale[0] * aspect[0]) ** -0.5 <= DECODE_HEADROOM
    assert TrainTransform(8, "rkrc").scaled_decode
    for crop in ("published", "rrc"):
        assert not TrainTransform(8, crop).scaled_decode
        assert TrainTransform(8, crop).takes_undecoded


def test_flips_happen_as_often_as_asked() -> None:
    image = picture(16, 16)
    plain, flipped = to_tensor(image), to_tensor(image).flip(2)
    always, never = TrainTransform(16, "none", hflip=1.0), TrainTransform(16, "none", hflip=0.0)
    half = TrainTransform(16, "none", hflip=0.5)
    assert all(torch.equal(always(image, 0, p), flipped) for p in range(5))
    assert all(torch.equal(never(image, 0, p), plain) for p in range(5))
    assert 70 < sum(torch.equal(half(image, 0, p), flipped) for p in range(200)) < 130


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 2), (5, 7)])
@pytest.mark.parametrize("crop", ["published", "rkrc", "rrc", "none"])
def test_odd_shapes_do_not_fail_or_fill_the_memory(shape: tuple[int, int], crop: TrainCrop) -> None:
    image = Image.fromarray(np.full((*shape, 3), 77, np.uint8))
    for position in range(4):
        sample = TrainTransform((20, 28), crop)(image, 0, position)
        assert sample.shape == (3, 20, 28)
        assert (sample == 77).all()
    assert (EvalTransform((20, 28))(image) == 77).all()
    assert (EvalTransform((20, 28), "square")(image) == 77).all()


def test_eval_crop_takes_the_centre() -> None:
    values = np.zeros((40, 100, 3), np.uint8)
    values[:, 30:70] = 200
    assert (EvalTransform(20)(Image.fromarray(values))[:, :, 3:-3] == 200).all()
    assert torch.equal(
        EvalTransform(40)(Image.fromarray(values)), to_tensor(Image.fromarray(values[:, 30:70]))
    )
    wide = EvalTransform((20, 50))(Image.fromarray(values))
    assert wide.shape == (3, 20, 50)
    assert (wide[:, :, 0] == 0).all()


def test_square_keeps_image_and_labels_together() -> None:
    labels = np.zeros((60, 100), np.uint8)
    labels[10:30, 40:60] = 182
    image = Image.fromarray(np.repeat((labels == 182)[..., None] * np.uint8(255), 3, axis=2))
    view = EvalTransform(30, "square")
    pixels, classes = view(image), view.labels(labels)
    assert classes.dtype == torch.int64
    assert classes.shape == (30, 30)
    assert torch.equal(classes == 182, pixels[0] > 127)
    assert torch.equal(classes[5:15, 10:20], torch.full((10, 10), 182))
    assert set(torch.unique(classes).tolist()) == {0, 182}
    big = EvalTransform(60, "square").labels(labels.astype(np.int32) * 1000)  # ids beyond 8 bits
    assert big.max().item() == 182_000
    with pytest.raises(UserError, match="square"):
        EvalTransform(30).labels(labels)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(UserError, match=r"unknown crop 'publishd'.*did you mean 'published'"):
        TrainTransform(8, "publishd")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="unknown eval transform"):
        EvalTransform(8, "centre")  # type: ignore[arg-type]
    for config in ("rnd-m9", "rand-m9-foo", "rand-x3", "augmix-m3", "rand-m9-tnonsense"):
        with pytest.raises(UserError, match="unknown augmentation"):
            TrainTransform(8, auto_augment=config)
    with pytest.raises(UserError, match="flip"):
        TrainTransform(8, hflip=1.5)
    with pytest.raises(UserError, match="pixels"):
        TrainTransform((0, 8))


def test_the_strongest_augmentation_is_possible() -> None:
    transform = TrainTransform(32, "published", "rand-m10-n8-inc1")
    samples = [transform(picture(), 0, position) for position in range(40)]
    assert all(sample.shape == (3, 32, 32) for sample in samples)
