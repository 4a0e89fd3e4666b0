"""A random resized crop decodes large JPEGs at reduced size, and stays close to the crop of a full decode."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from localign.data import decoding
from localign.data.decoding import CROP_MARGIN, UndecodedJpeg, UnreadableImage, decode_image, open_image
from localign.data.images import ImageData
from localign.data.loader import EvalLoader, TrainLoader
from localign.data.sources import FolderSource, open_source
from localign.data.transforms import TrainTransform
from localign.errors import UserError
from localign.finetuning import FinetuneConfig
from localign.finetuning.task import resolve_finetune
from localign.options.align import AlignConfig
from localign.options.data import DataConfig
from localign.options.names import TrainCrop

PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet-sample" / "train"
SIZE = 32


def waves(height: int, width: int) -> Image.Image:
    """Smooth in places and fine in others, different in every corner."""
    y, x = np.mgrid[0:height, 0:width] / 40
    channels = [np.sin(x * y), np.sin(x + 2 * y), np.cos(3 * x - y * y / 9)]
    values = 127 + 100 * np.stack(channels, -1) + np.random.default_rng(0).normal(0, 12, (height, width, 1))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def both(
    data: bytes, position: int, crop: TrainCrop = "rrc", size: int = SIZE
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sample at a position, from a file decoded for its crop, and from the file decoded in full."""
    transform = TrainTransform(size, crop)
    scaled = transform(open_image(data, "x"), 3, position)
    return scaled.int(), transform(decode_image(data, "x"), 3, position).int()


@pytest.fixture
def fractions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The fractions at which JPEGs have been decoded."""
    met: list[int] = []
    decode = UndecodedJpeg.decode

    def noted(self: UndecodedJpeg, fraction: int = 1) -> Image.Image:
        met.append(fraction)
        return decode(self, fraction)

    monkeypatch.setattr(UndecodedJpeg, "decode", noted)
    return met


@pytest.mark.parametrize("crop", ["rrc", "published"])
def test_samples_stay_within_three_levels_of_a_full_decode(crop: TrainCrop, fractions: list[int]) -> None:
    data = jpeg(waves(601, 803))
    for position in range(40):
        scaled, full = both(data, position, crop)
        assert scaled.shape == full.shape == (3, SIZE, SIZE)
        assert float((scaled - full).abs().float().mean()) < 3, position
        assert abs(float((scaled - full).float().mean())) < 0.3, position  # neither brighter nor shifted
    assert set(fractions) == ({4, 8} if crop == "rrc" else {2, 4, 8})


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", [(600, 800), (601, 803)])
def test_turned_photographs_are_cropped_where_a_full_decode_is(
    orientation: int, shape: tuple[int, int]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(waves(*shape), exif=exif)
    image = open_image(data, "x")
    assert isinstance(image, UndecodedJpeg)
    full = decode_image(data, "x")
    assert image.size == full.size == image.decode().size
    width, height = image.size
    corners = [(0, 0), (width - 280, 0), (0, height - 240), (width - 280, height - 240), (101, 83)]
    for left, top in corners:
        part = image.resized_crop((left, top, 280, 240), (SIZE, SIZE), Image.Resampling.BICUBIC)
        whole = full.crop((left, top, left + 280, top + 240)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        difference = np.abs(np.asarray(part).astype(int) - np.asarray(whole))
        assert difference.mean() < 2, (left, top)  # 3 to 18 without the correction for odd sizes


def test_the_fraction_leaves_the_crop_its_margin(fractions: list[int]) -> None:
    image = open_image(jpeg(waves(640, 640)), "x")
    assert isinstance(image, UndecodedJpeg)
    for side in (640, 321, 320, 319, 161, 160, 159, 81, 80, 79, 20):
        image.resized_crop((0, 0, side, side), (SIZE, SIZE), Image.Resampling.BILINEAR)
    assert fractions == [8, 8, 8, 4, 4, 4, 2, 2, 2, 1, 1]
    assert CROP_MARGIN * SIZE * 8 == 320
    fractions.clear()
    image.resized_crop((0, 0, 640, 80), (SIZE, SIZE), Image.Resampling.BILINEAR)  # the shorter side decides
    image.resized_crop((0, 0, 640, 80), (4, SIZE), Image.Resampling.BILINEAR)
    assert fractions == [2, 8]


@pytest.mark.parametrize("size", [SIZE, (24, 40)])
def test_small_files_are_decoded_in_full_to_the_same_pixels(
    size: int | tuple[int, int], fractions: list[int]
) -> None:
    data = jpeg(waves(58, 71))
    transform = TrainTransform(size, "rrc", "rand-m9-mstd0.5-inc1")
    for position in range(20):
        scaled = transform(open_image(data, "x"), 3, position)
        assert torch.equal(scaled, transform(decode_image(data, "x"), 3, position))
    assert set(fractions) == {1}


@pytest.mark.parametrize("size", [SIZE, (24, 40)])
@pytest.mark.parametrize("shape", [(58, 71), (90, 40), (200, 203)])
def test_a_published_crop_of_a_file_is_the_crop_of_its_pixels(
    size: int | tuple[int, int], shape: tuple[int, int], fractions: list[int]
) -> None:
    """Only the part that the crop shows is resized. Zoomed, stretched and padded samples agree to a rounding."""
    data = jpeg(waves(*shape))
    transform = TrainTransform(size, "published")
    for position in range(60):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoding, "CROP_MARGIN", 100.0)  # decode in full
            ours = transform(open_image(data, "x"), 3, position).int()
        difference = ours - transform(decode_image(data, "x"), 3, position).int()
        assert difference.abs().max() <= 2, position
        assert abs(float(difference.float().mean())) < 0.1, (
            position
        )  # roundings alone, neither brighter nor shifted
    assert set(fractions) == {1}


def test_a_sample_does_not_depend_on_what_was_decoded_before() -> None:
    data = jpeg(waves(600, 800))
    transform, image = TrainTransform(SIZE, "rrc"), open_image(data, "x")
    samples = [transform(image, 3, p) for p in range(8)]
    again = [TrainTransform(SIZE, "rrc")(open_image(data, "x"), 3, p) for p in reversed(range(8))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(samples, again, strict=True))
    assert len({bytes(s.numpy()) for s in samples}) == 8


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "progressive"])
def test_every_kind_of_jpeg_is_decoded_at_a_fraction(mode: str, fractions: list[int]) -> None:
    image = waves(600, 800)
    data = jpeg(image, progressive=True) if mode == "progressive" else jpeg(image.convert(mode))
    for position in range(10):
        scaled, full = both(data, position)
        assert float((scaled - full).abs().float().mean()) < 3, position
    assert max(fractions) > 1


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "I;16"])
def test_other_formats_are_decoded_as_before(mode: str, tmp_path: Path) -> None:
    image = waves(300, 400)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256)
    else:
        image = image.quantize() if mode == "P" else image.convert(mode)
    image.save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    opened = open_image(data, "x")
    assert isinstance(opened, Image.Image)
    assert opened.tobytes() == decode_image(data, "x").tobytes()
    assert torch.equal(*both(data, 5))


def test_an_extreme_strip_is_decoded_in_full(fractions: list[int]) -> None:
    assert torch.equal(*both(jpeg(waves(64, 3000)), 0))
    assert fractions == [1]


@pytest.mark.parametrize("progressive", [False, True])
def test_a_file_cut_short_is_unreadable_whatever_the_crop(
    progressive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as another library may leave it
    data = jpeg(waves(600, 800), progressive=progressive)
    cut = open_image(data[: len(data) * 9 // 10], "cut.jpg")
    for position in range(10):
        with pytest.raises(UnreadableImage, match=r"^cut\.jpg: .*truncated"):
            TrainTransform(SIZE, "rrc")(cut, 3, position)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_bounds_on_size_hold_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = jpeg(waves(300, 400))
    monkeypatch.setattr(decoding, "MAX_PIXELS", 300 * 400 - 1)
    with pytest.raises(UnreadableImage, match="400 x 300 pixels"):
        open_image(data, "x")
    monkeypatch.setattr(decoding, "MAX_BYTES", 100)
    with pytest.raises(UnreadableImage, match=r"the limit is 100$"):
        open_image(data, "x")
    with pytest.raises(UnreadableImage, match="empty file"):
        open_image(b"", "x")
    with pytest.raises(UnreadableImage, match="not an image"):
        open_image(b"no image at all", "x")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PNG and twelve JPEGs far larger than SIZE, one of them truncated and one not an image."""
    root = tmp_path_factory.mktemp("large")
    for i in range(12):
        data = jpeg(waves(400 + 8 * i, 520))
        (root / f"{i:02}.jpg").write_bytes(data[:9000] if i == 4 else b"nothing" if i == 7 else data)
    waves(200, 300).save(root / "last.png")
    return root


def train_loader(root: Path, transform: TrainTransform, **options: Any) -> TrainLoader:
    settings: dict[str, Any] = {
        "seed": 2,
        "global_batch": 4,
        "micro_batch": 2,
        "end_step": 9,
        "max_bad_share": 0.2,
    }
    return TrainLoader(FolderSource(root), transform, **settings | options)


def seen(*loaders: TrainLoader) -> dict[int, tuple[int, bytes]]:
    return {
        int(position): (int(index), bytes(image.numpy()))
        for loader in loaders
        for batch in loader
        for image, position, index in zip(*batch[:3], strict=True)
    }


def test_a_run_resumes_exactly_and_counts_the_same_bad_files(large: Path, fractions: list[int]) -> None:
    transform = TrainTransform(SIZE, "rrc")
    whole = train_loader(large, transform)
    reference = seen(whole)
    assert max(fractions) > 1
    assert set(whole.bad.reasons) == {"04.jpg", "07.jpg"}
    assert "truncated" in whole.bad.reasons["04.jpg"]
    ranks = [
        train_loader(large, transform, rank=r, world_size=2, micro_batch=1, workers=1, start_step=4)
        for r in (0, 1)
    ]
    assert seen(*ranks) == {p: v for p, v in reference.items() if p >= 16}
    full = train_loader(large, TrainTransform(SIZE, "rrc", decode="full"))
    content = seen(full)
    assert full.bad.reasons == whole.bad.reasons
    assert {p: v[0] for p, v in content.items()} == {p: v[0] for p, v in reference.items()}
    assert content != reference


def test_sources_of_sources_pass_undecoded_images_on(large: Path, tmp_path: Path) -> None:
    (tmp_path / "out.txt").write_text("00.jpg\n07.jpg\n")
    entries = f"{{data: {large}, exclude: out.txt}}, {{data: {large}}}"
    (tmp_path / "m.yaml").write_text(f"mixture: [{entries}]")
    excluding = open_source(str(large), exclude=str(tmp_path / "out.txt"))
    mixture = open_source(str(tmp_path / "m.yaml"))
    for source, index in ((excluding, 0), (mixture, 0), (mixture, 12)):
        image = source.undecoded(index)
        assert isinstance(image, UndecodedJpeg)
        assert image.decode().tobytes() == source.load(index).tobytes()
    cut = mixture.undecoded(3)
    assert isinstance(cut, UndecodedJpeg)
    with pytest.raises(UnreadableImage) as caught:  # decoding finds that the file is truncated
        cut.decode()
    assert caught.value.name == mixture.name(3)
    assert caught.value.name.endswith(": 04.jpg")
    assert isinstance(open_source("scenes").undecoded(0), Image.Image)


def opened(**options: object) -> ImageData:
    return ImageData(DataConfig(**options), (SIZE, SIZE))  # type: ignore[arg-type]


def sizes_loaded(data: ImageData) -> set[tuple[int, int]]:
    return {data.source.load(i).size for i in (0, 1)}


def test_the_option_decides_for_both_crops_and_never_for_validation(
    large: Path, fractions: list[int]
) -> None:
    folder = str(large)
    assert not opened(data=folder, crop="rrc", decode="full").transform.takes_undecoded
    assert opened(data=folder, crop="rrc").transform.takes_undecoded
    assert opened(data=folder, crop="rrc", decode="scaled").transform.takes_undecoded
    whole = {(520, 400), (520, 408)}
    assert sizes_loaded(opened(data=folder, decode="full")) == whole
    assert opened(data=folder).transform.takes_undecoded
    assert sizes_loaded(opened(data=folder, crop="rkrc")) == {(65, 50), (65, 51)}
    data = opened(data=folder, val=folder)
    assert data.val_source is not None
    assert {data.val_source.load(i).size for i in (0, 1)} == whole
    batches = EvalLoader(data.val_source, data.val_transform, batch=4, max_bad_share=0.2)
    assert sum(len(b.images) for b in batches) == 11
    assert fractions == []


def test_a_random_resized_crop_records_its_decode_mode() -> None:
    for given in ("rrc", "published", None):
        expected = "scaled" if given == "rrc" else None
        assert AlignConfig(crop=given, data="photographs").decode == expected
    assert AlignConfig(crop="rrc", data="photographs", decode="full").decode == "full"
    assert resolve_finetune(FinetuneConfig(data="photographs")).decode == "scaled"
    assert resolve_finetune(FinetuneConfig(data="photographs", crop="published")).decode is None
    assert resolve_finetune(FinetuneConfig(data="scenes")).decode is None


def test_random_resized_crops_of_scenes_set_no_decode_mode() -> None:
    aligned = AlignConfig(data="scenes", crop="rrc")
    finetuned = resolve_finetune(FinetuneConfig(data="scenes", crop="rrc"))
    for config in (aligned, finetuned):
        assert config.decode is None
        ImageData(config, (48, 48))


def test_scenes_are_not_decoded() -> None:
    with pytest.raises(UserError, match="--decode has no effect on scenes"):
        opened(data="scenes", decode="full")
    with pytest.raises(UserError, match="unknown decode mode 'half'"):
        TrainTransform(8, decode="half")  # type: ignore[arg-type]


def test_decoded_jpegs_outlive_their_files(tmp_path: Path) -> None:
    image = decode_image(jpeg(waves(50, 60)), "x")
    use: list[Callable[[], object]] = [image.copy, image.tobytes, lambda: image.resize((9, 9)), image.load]
    for action in use:
        action()
    image.save(tmp_path / "again.png")
    assert Image.open(tmp_path / "again.png").tobytes() == image.tobytes()


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the sample photographs (shared/data) are not here")
def test_photographs_stay_within_a_level_of_a_full_decode(fractions: list[int]) -> None:
    differences = []
    for number, file in enumerate(sorted(PHOTOS.rglob("*.jpg"))[:60]):
        scaled, full = both(file.read_bytes(), number, size=48)
        differences.append(float((scaled - full).abs().float().mean()))
    assert sum(f > 1 for f in fractions) > 30
    assert sum(differences) / len(differences) < 1
    assert max(differences) < 4
