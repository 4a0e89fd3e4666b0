"""What an image takes in memory or time is bounded before it is decoded, and the line names what raises the bound."""

from __future__ import annotations

import io
import random
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from localign.data import decoding
from localign.data.decoding import UnreadableImage, decode_image, decode_pixels, open_image, to_rgb
from localign.data.loader import TrainLoader
from localign.data.sources import FolderSource
from localign.data.transforms import TrainTransform
from localign.data.untrusted import modes
from localign.data.untrusted.bounds import bound, jpeg_scans
from localign.errors import UserError
from localign.probing.segmentation import FolderSegmentation


def noise(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def with_scans(count: int, image: Image.Image | None = None) -> bytes:
    """A progressive JPEG whose last scan is repeated until there are ``count`` scans."""
    data = encoded(image or noise(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (count - data.count(b"\xff\xda") + 1) + b"\xff\xd9"


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">L", len(content)) + kind + content + struct.pack(">L", zlib.crc32(kind + content))


def png_with(*chunks: bytes) -> bytes:
    data = encoded(noise(), "PNG")
    end_of_header = 8 + 25
    return data[:end_of_header] + b"".join(chunks) + data[end_of_header:]


ZEROS = zlib.compress(bytes(10 * 2**20))
"""10 KB that expand to 10 MB."""

JPEG, PNG, GIF = encoded(noise(), "JPEG"), encoded(noise(), "PNG"), encoded(noise().quantize(16), "GIF")
WEBP = encoded(noise(), "WEBP", save_all=True, append_images=[noise().rotate(180)])
LARGE_HEADER = chunk(b"IHDR", struct.pack(">LLBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0))
HOSTILE: dict[str, tuple[bytes, str]] = {
    "a thousand scans": (with_scans(1000), "LOCALIGN_MAX_JPEG_SCANS"),
    "one scan too many": (with_scans(101), "LOCALIGN_MAX_JPEG_SCANS"),
    "a huge colour profile": (png_with(chunk(b"iCCP", b"x\0\0" + ZEROS)), "LOCALIGN_MAX_PNG_TEXT"),
    "a huge text": (png_with(chunk(b"zTXt", b"Comment\0\0" + ZEROS)), "LOCALIGN_MAX_PNG_TEXT"),
    "a huge international text": (
        png_with(chunk(b"iTXt", b"Comment\0\x01\0\0\0" + ZEROS)),
        "LOCALIGN_MAX_PNG_TEXT",
    ),
    "very many texts": (
        png_with(*[chunk(b"zTXt", b"C%d\0\0" % i + zlib.compress(bytes(2**20 - 1))) for i in range(70)]),
        "LOCALIGN_MAX_PNG_TEXT",
    ),
    "a PNG of 2 ** 62 pixels": (PNG[:8] + LARGE_HEADER + PNG[33:], "LOCALIGN_MAX_PIXELS"),
    "a GIF of 2 ** 32 pixels": (GIF[:6] + struct.pack("<HH", 65535, 65535) + GIF[10:], "LOCALIGN_MAX_PIXELS"),
    "a WebP of 2 ** 28 pixels": (WEBP[:24] + b"\xfe\x3f\0\xfe\x3f\0" + WEBP[30:], "LOCALIGN_MAX_PIXELS"),
    "very many chunks": (png_with(*[chunk(b"abCd", b"")] * 30_000), "LOCALIGN_MAX_IMAGE_PARTS"),
    "very many segments": (JPEG[:2] + b"\xff\xe5\0\2" * 30_000 + JPEG[2:], "LOCALIGN_MAX_IMAGE_PARTS"),
    "very many fillings": (JPEG[:2] + b"\xff\xff" * 30_000 + JPEG[2:], "LOCALIGN_MAX_IMAGE_PARTS"),
}  # fmt: skip
READERS: dict[str, Callable[[bytes, str], object]] = {
    "decode_image": decode_image,
    "decode_pixels": decode_pixels,
    "open_image": open_image,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_image_is_refused_at_once_with_the_variable_that_allows_it(kind: str, reader: str) -> None:
    data, variable = HOSTILE[kind]
    begin = time.monotonic()
    with pytest.raises(UnreadableImage, match=variable) as caught:
        READERS[reader](data, "x")
    assert time.monotonic() - begin < 3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [k for k in HOSTILE if "pixels" not in k])
def test_a_raised_bound_lets_the_image_through(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_SCANS", 2000)
    monkeypatch.setattr(decoding, "MAX_TEXT", 2**24)
    monkeypatch.setattr(decoding, "MAX_PARTS", 100_000)
    assert decode_image(HOSTILE[kind][0], "x").size == (64, 48)


def test_training_names_hostile_images_and_goes_on(tmp_path: Path) -> None:
    for number in range(30):
        noise().save(tmp_path / f"{number}.png")
    for number, (data, _) in enumerate(HOSTILE.values()):
        (tmp_path / f"bomb{number}.png").write_bytes(data)
    transform = TrainTransform(8)
    loader = TrainLoader(
        FolderSource(tmp_path),
        transform,
        seed=0,
        global_batch=13,
        micro_batch=13,
        end_step=3,
        max_bad_share=0.5,
    )
    assert sum(len(batch.images) for batch in loader) == 39
    assert all("LOCALIGN_MAX" in reason for reason in loader.bad.reasons.values())
    assert len(loader.bad) == len(HOSTILE)


@pytest.mark.parametrize("kind", ["a huge colour profile", "a PNG of 2 ** 62 pixels"])
def test_a_hostile_label_map_is_an_error(kind: str, tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    noise().save(tmp_path / "images" / "x.jpg")
    (tmp_path / "masks" / "x.png").write_bytes(HOSTILE[kind][0])
    source = FolderSegmentation(tmp_path / "images", tmp_path / "masks", ["a"])
    with pytest.raises(UserError, match=r"cannot read the label map .*LOCALIGN_MAX"):
        source.load_labelled(0)


@pytest.mark.parametrize("count", [10, 11, 50, 100])
def test_scans_are_counted_and_as_many_as_allowed_are_decoded(count: int) -> None:
    data = with_scans(count)
    assert jpeg_scans(data, 0) == count
    assert decode_image(data, "x").size == (64, 48)


def test_marks_of_scans_that_are_none_do_not_count() -> None:
    """Previews and colour profiles hold such bytes, and phones append films to photographs."""
    plain = encoded(noise(), "JPEG")
    marks = b"\xff\xda" * 500
    segment = b"\xff\xe2" + struct.pack(">H", len(marks) + 2) + marks
    random_bytes = random.Random(0).randbytes(2**24)
    for data in (plain[:2] + segment + plain[2:], plain + marks, plain + random_bytes):
        assert data.count(b"\xff\xda") > decoding.MAX_SCANS
        assert jpeg_scans(data, 0) == 1
        assert decode_image(data, "x").tobytes() == decode_image(plain, "x").tobytes()


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}, {"optimize": True}]
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_kind_of_jpeg_has_its_number_of_scans(mode: str, options: dict[str, object]) -> None:
    data = encoded(noise().convert(mode), "JPEG", **options)
    exact = jpeg_scans(data, 0)
    assert exact == data.count(b"\xff\xda")
    assert exact <= 20 < decoding.MAX_SCANS


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"\xff\xda", b"\xff\xda\xff", b"\xff\xda\0\0" * 9, b"\xff" * 999]
)
def test_counting_scans_of_no_jpeg_ends(data: bytes) -> None:
    assert jpeg_scans(data, 0) >= 0


def test_sixteen_bits_take_little_more_memory_than_the_image() -> None:
    """They once took eight bytes a pixel, 1 GB at the limit, besides the image."""
    image = Image.fromarray(np.full((3000, 4000), 40_000, dtype=np.uint16))
    tracemalloc.start()
    assert to_rgb(image, "x").getpixel((3999, 2999)) == (156, 156, 156)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 48 * 2**20


def of_mode(mode: str) -> Image.Image:
    values = np.random.default_rng(1).integers(0, 65536, (37, 23))
    if mode == "I, up to 255":
        return Image.fromarray((values >> 8).astype(np.int32))
    if mode == "I":
        return Image.fromarray((values - 100).astype(np.int32))
    if mode == "I;16":
        return Image.fromarray(values.astype(np.uint16))
    image = Image.fromarray((values % 256).astype(np.uint8))
    if mode == "P":
        palette = image.convert("P")
        palette.info["transparency"] = bytes(range(256))
        return palette
    if mode == "L, one clear level":
        image.info["transparency"] = 7
        return image
    channels = [image.rotate(180 * i) for i in range(4)]
    return Image.merge("RGBA", channels).convert(mode)


@pytest.mark.parametrize(
    "mode", ["I", "I, up to 255", "I;16", "P", "L, one clear level", "RGBA", "LA", "RGBa"]
)
def test_bands_are_the_image(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = to_rgb(of_mode(mode), "x")
    for pixels in (1, 23, 100, 37 * 23 - 1):
        monkeypatch.setattr(modes, "BAND_PIXELS", pixels)
        assert to_rgb(of_mode(mode), "x").tobytes() == whole.tobytes()


def test_settings_of_other_libraries_neither_matter_nor_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 2**30)
    assert decode_image(encoded(noise(), "PNG"), "x").size == (64, 48)
    with pytest.raises(UnreadableImage, match="LOCALIGN_MAX_PNG_TEXT"):
        decode_image(HOSTILE["a huge text"][0], "x")
    assert (Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK) == (100, 2**30)


def test_a_bound_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bound("LOCALIGN_MAX_PIXELS", 7) == 7
    monkeypatch.setenv("LOCALIGN_MAX_PIXELS", "1000")
    assert bound("LOCALIGN_MAX_PIXELS", 7) == 1000


@pytest.mark.parametrize("value", ["", "0", "-1", "1e9", "many", "1.5", "²"])
def test_a_bound_that_is_no_number_is_one_line(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALIGN_MAX_PIXELS", value)
    with pytest.raises(
        UserError, match="the environment variable LOCALIGN_MAX_PIXELS must be a whole number"
    ):
        bound("LOCALIGN_MAX_PIXELS", 7)


def test_a_pointer_of_git_lfs_is_called_what_it_is() -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    with pytest.raises(UnreadableImage, match="Git LFS pointer"):
        decode_image(pointer, "x")
