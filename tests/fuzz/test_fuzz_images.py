"""Damaged photographs are decoded, or refused in one line; all readers see the same pixels."""

from __future__ import annotations

import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from fuzzing import bounded, result_or_refusal
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from localign.data.decoding import (
    UndecodedJpeg,
    UnreadableImage,
    decode_image,
    decode_pixels,
    open_image,
    stored_size,
)
from localign.data.transforms import TrainTransform
from localign.data.untrusted.bounds import jpeg_scans
from localign.probing.segmentation import FolderSegmentation

PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet-sample" / "val"


def photograph() -> Image.Image:
    if PHOTOS.is_dir():
        with Image.open(next(iter(sorted(PHOTOS.rglob("*.jpg"))))) as image:
            return image.convert("RGB").resize((72, 52))
    return Image.effect_noise((72, 52), 60).convert("RGB")


def exif(orientation: int) -> bytes:
    entries = Image.Exif()
    entries[0x0112], entries[0x010F], entries[0x011A] = orientation, "a camera with a long name", 72.5
    return entries.tobytes()


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


PHOTO = photograph()
DEEP = Image.fromarray(np.asarray(PHOTO.convert("L")).astype(np.uint16) * 257)
CLEAR = PHOTO.copy()
CLEAR.putalpha(PHOTO.convert("L"))
FILES: dict[str, bytes] = {
    "baseline JPEG": encoded(PHOTO, "JPEG"),
    "turned JPEG": encoded(PHOTO, "JPEG", exif=exif(6)),
    "progressive JPEG": encoded(PHOTO, "JPEG", progressive=True, exif=exif(3)),
    "JPEG with restarts": encoded(PHOTO, "JPEG", restart_marker_blocks=4),
    "grey JPEG": encoded(PHOTO.convert("L"), "JPEG"),
    "CMYK JPEG": encoded(PHOTO.convert("CMYK"), "JPEG"),
    "PNG": encoded(PHOTO, "PNG", exif=exif(8), dpi=(300, 300)),
    "palette PNG": encoded(PHOTO.quantize(30), "PNG", transparency=2),
    "16-bit PNG": encoded(DEEP, "PNG"),
    "RGBA PNG": encoded(CLEAR, "PNG"),
    "animated PNG": encoded(PHOTO, "PNG", save_all=True, append_images=[PHOTO.rotate(90)]),
    "WebP": encoded(PHOTO, "WEBP", exif=exif(5)),
    "lossless WebP": encoded(CLEAR, "WEBP", lossless=True),
    "animated GIF": encoded(PHOTO.quantize(32), "GIF", save_all=True, append_images=[PHOTO.quantize(9)]),
    "TIFF": encoded(PHOTO, "TIFF", exif=exif(7)),
    "LZW TIFF": encoded(PHOTO, "TIFF", compression="tiff_lzw"),
    "JPEG TIFF": encoded(PHOTO, "TIFF", compression="jpeg"),
    "BMP": encoded(PHOTO, "BMP"),
}


def flipped(data: bytes, bits: list[int]) -> bytes:
    spoilt = bytearray(data)
    for bit in bits:
        spoilt[bit // 8 % len(data)] ^= 1 << bit % 8
    return bytes(spoilt)


def jpeg_parts(data: bytes) -> list[bytes]:
    """The start, the segments before the first scan, and the rest."""
    parts, at = [data[:2]], 2
    while data[at + 1] != 0xDA:
        length = 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        parts.append(data[at : at + length])
        at += length
    return [*parts, data[at:]]


def png_parts(data: bytes) -> list[bytes]:
    """The signature and the chunks."""
    parts, at = [data[:8]], 8
    while at < len(data):
        length = 12 + int.from_bytes(data[at : at + 4], "big")
        parts.append(data[at : at + length])
        at += length
    return parts


def resealed(part: bytes) -> bytes:
    """A PNG chunk with the checksum of its content."""
    return part[:-4] + struct.pack(">L", zlib.crc32(part[4:-4])) if len(part) >= 12 else part


bits = st.lists(st.integers(0, 8 * 60) | st.integers(0, 8 * 20_000), min_size=1, max_size=6)
names = st.sampled_from(sorted(FILES))


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A photograph with flipped bits, cut off, with another's head or tail, or with its parts in disorder."""
    data = FILES[draw(names)]
    how = draw(st.sampled_from(["flip", "cut", "swap heads", "parts", "zeros", "twice"]))
    if how == "flip":
        return flipped(data, draw(bits))
    if how == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if how == "swap heads":
        at = draw(st.integers(1, 200))
        return FILES[draw(names)][:at] + data[at:]
    if how == "zeros":
        at = draw(st.integers(0, len(data)))
        return data[:at] + bytes(draw(st.integers(1, 400))) + data[at:]
    if how == "twice":
        return data + FILES[draw(names)]
    is_jpeg, is_png = data.startswith(b"\xff\xd8"), data.startswith(b"\x89PNG")
    if not (is_jpeg or is_png):
        return flipped(data, draw(bits))
    head, *parts = jpeg_parts(data) if is_jpeg else png_parts(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(parts) - 1))
        change = draw(st.sampled_from(["drop", "repeat", "move", "flip"]))
        part = parts.pop(at)
        if change == "repeat":
            parts[at:at] = [part] * draw(st.integers(2, 30))
        elif change == "move":
            parts.insert(draw(st.integers(0, len(parts))), part)
        elif change == "flip":
            spoilt = flipped(part, draw(bits))
            parts.insert(at, resealed(spoilt) if is_png else spoilt)
        if not parts:
            break
    return head + b"".join(parts)


def pixels_or_refusal(data: bytes) -> Image.Image | None:
    try:
        image = decode_image(data, "x")
    except UnreadableImage as error:
        reason = error.reason
    else:
        assert image.mode == "RGB"
        return image
    assert reason.strip(), "no reason"
    assert "\n" not in reason
    return None


@bounded
@given(damaged())
def test_readers_agree_on_damaged_photographs(data: bytes) -> None:
    begin = time.monotonic()
    image = pixels_or_refusal(data)
    try:
        fast = decode_pixels(data, "x")
    except UnreadableImage:
        fast = None
    assert (fast is None) == (image is None)
    if image is not None and fast is not None:
        assert np.array_equal(fast.permute(1, 2, 0).numpy(), np.asarray(image))
    assert time.monotonic() - begin < 20


@bounded
@given(damaged(), st.integers(0, 9))
def test_crops_of_damaged_photographs_are_inside_them(data: bytes, position: int) -> None:
    image = pixels_or_refusal(data)
    try:
        opened = open_image(data, "x")
        sample = TrainTransform(16, "rrc", decode="scaled")(opened, 0, position)
    except UnreadableImage:
        assert image is None
        return
    assert sample.shape == (3, 16, 16)
    if image is not None and isinstance(opened, UndecodedJpeg):
        assert opened.size == opened.decode().size == image.size
        expected = TrainTransform(16, "rrc", decode="full")(image, 0, position)
        assert abs(sample.float() - expected.float()).mean() < 40


@bounded
@given(damaged())
def test_sizes_without_decoding_are_those_of_the_stored_pixels(data: bytes) -> None:
    try:
        stored = decode_image(data, "x", upright=False)
    except UnreadableImage:
        return
    _, width, height = stored_size(data, "x")
    assert stored.size == (width, height)
    assert jpeg_scans(data, 0) >= 0


@bounded
@given(damaged())
def test_any_label_map_is_read_or_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    folder = tmp_path / "both"
    folder.mkdir(exist_ok=True)
    (folder / "x.jpg").write_bytes(FILES["baseline JPEG"])
    (folder / "x.png").write_bytes(data)
    source = FolderSegmentation(folder, folder, [str(i) for i in range(256)])
    read = result_or_refusal(lambda: source.load_labelled(0))
    assert read is None or read[1].shape == (52, 72)


@pytest.mark.parametrize("name", FILES)
def test_the_photographs_themselves_are_read(name: str) -> None:
    image = pixels_or_refusal(FILES[name])
    assert image is not None
    assert sorted(image.size) == [52, 72]
