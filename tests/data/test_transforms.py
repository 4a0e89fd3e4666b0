"""A transformed sample is a pure function of (image, seed, position), and has the configured size."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_train

from localign import rng
from localign.data.transforms import EvalTransform, TrainTransform, to_tensor
from localign.errors import UserError
from localign.options.names import TrainCrop


def picture(height: int = 90, width: int = 140) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    values = np.stack([rows * 255 // height, columns * 255 // width, (rows * columns) % 256], axis=-1)
    return Image.fromarray(values.astype(np.uint8))


@pytest.mark.parametrize("crop", ["published", "rrc", "none"])
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


@pytest.mark.parametrize(
    ("crop", "mode", "auto_augment"),
    [("published", "rkrc", None), ("published", "rkrc", "rand-m9-mstd0.5-inc1"), ("rrc", "rrc", None)],
)
def test_samples_equal_those_of_timm(crop: TrainCrop, mode: str, auto_augment: str | None) -> None:
    reference = transforms_imagenet_train(
        32,
        train_crop_mode=mode,
        interpolation="random",
        color_jitter=None,  # type: ignore[arg-type]
        auto_augment=auto_augment,
        use_prefetcher=True,
    )
    for position in range(30):
        with rng.seeded_globals(5, "transform", position):
            expected = reference(picture())
        expected = expected if isinstance(expected, torch.Tensor) else torch.from_numpy(expected)
        assert torch.equal(TrainTransform(32, crop, auto_augment)(picture(), 5, position), expected)


def test_the_published_crop_never_magnifies_beyond_the_decoding_headroom() -> None:
    from localign.data.sources import DECODE_HEADROOM
    from localign.data.transforms import PUBLISHED_ASPECT, PUBLISHED_SCALE

    assert (PUBLISHED_SCALE[0] * PUBLISHED_ASPECT[0]) ** -0.5 <= DECODE_HEADROOM
    assert TrainTransform(8).scaled_decode
    assert not TrainTransform(8, "rrc").scaled_decode


def test_flips_happen_as_often_as_asked() -> None:
    image = picture(16, 16)
    plain, flipped = to_tensor(image), to_tensor(image).flip(2)
    always, never = TrainTransform(16, "none", hflip=1.0), TrainTransform(16, "none", hflip=0.0)
    half = TrainTransform(16, "none", hflip=0.5)
    assert all(torch.equal(always(image, 0, p), flipped) for p in range(5))
    assert all(torch.equal(never(image, 0, p), plain) for p in range(5))
    assert 70 < sum(torch.equal(half(image, 0, p), flipped) for p in range(200)) < 130


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 2), (5, 7)])
@pytest.mark.parametrize("crop", ["published", "rrc", "none"])
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
