"""What a file says of its pixels (orientation, mode, size) is checked where it is read, and once for all readers."""

from __future__ import annotations

import base64
import io
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from localign.data.decoding import (
    UndecodedJpeg,
    decode_image,
    decode_pixels,
    open_image,
    read_image,
    stored_size,
    upright_rgb,
)
from localign.data.transforms import TrainTransform
from localign.errors import UserError
from localign.vlm.data.images import open_image as vlm_image
from localign.vlm.scoring.readers import StoredImage, stored_image

SHORT, LONG, BYTE, RATIONAL = 3, 4, 1, 5
SEEN_IN_THE_WILD = [0, 9, 49, 255, 256, 65535]


def exif(value: bytes, kind: int = SHORT, count: int = 1) -> bytes:
    """An EXIF block that holds the orientation only; ``value`` has four bytes, in little-endian order."""
    return b"Exif\0\0" + struct.pack("<2sHLHHHL4sL", b"II", 42, 8, 1, 0x0112, kind, count, value, 0)


def orientation(value: int) -> bytes:
    return exif(struct.pack("<HH", value, 0))


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def picture(width: int = 96, height: int = 64) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 - x * 2, y * 3, np.full_like(x, 200)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def from_url(data: bytes, form: str) -> Image.Image:
    return vlm_image(f"data:image/{form.lower()};base64,{base64.b64encode(data).decode()}")


def from_pillow(data: bytes, form: str) -> Image.Image:
    return vlm_image(Image.open(io.BytesIO(data)))


READERS: dict[str, Callable[[bytes, str], object]] = {
    "decode_image": lambda data, form: decode_image(data, "x"),
    "decode_pixels": lambda data, form: decode_pixels(data, "x").permute(1, 2, 0),
    "undecoded": lambda data, form: (o := open_image(data, "x")) and (
        o.decode() if isinstance(o, UndecodedJpeg) else o
    ),
    "upright_rgb": lambda data, form: upright_rgb(Image.open(io.BytesIO(data)), "x"),
    "vlm, PIL": from_pillow,
    "vlm, data URL": from_url,
}  # fmt: skip


def pixels_of(reader: str, data: bytes, form: str) -> NDArray[np.uint8]:
    return np.asarray(READERS[reader](data, form), dtype=np.uint8)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("value", SEEN_IN_THE_WILD)
def test_an_orientation_outside_1_to_8_counts_as_1_for_every_reader(
    value: int, form: str, reader: str
) -> None:
    options: dict[str, object] = {"lossless": True} if form == "WEBP" else {}
    plain = encoded(picture(), form, **options)
    odd = encoded(picture(), form, exif=orientation(value), **options)
    assert plain != odd
    assert np.array_equal(pixels_of(reader, odd, form), pixels_of("decode_image", plain, form))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("value", range(1, 9))
def test_every_reader_turns_an_image_in_the_same_way(value: int, form: str, reader: str) -> None:
    options: dict[str, object] = {"lossless": True} if form == "WEBP" else {}
    data = encoded(picture(), form, exif=orientation(value), **options)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert turned.size == ((96, 64) if value < 5 else (64, 96))
    assert np.array_equal(pixels_of(reader, data, form), np.asarray(turned.convert("RGB")))


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (exif(struct.pack("<L", 6), LONG), 6),
        (exif(struct.pack("<L", 9), LONG), 1),
        (exif(b"\x06\0\0\0", BYTE), 1),
        (exif(struct.pack("<HH", 6, 3), SHORT, 2), 6),
        (exif(struct.pack("<L", 8), RATIONAL), 1),
        (exif(struct.pack("<HH", 6, 0), 77), 1),
        (b"Exif\0\0II", 1),
        (b"Exif\0\0not a directory of tags", 1),
        (b"Exif\0\0", 1),
    ],
)
def test_an_orientation_of_another_type_or_a_broken_block_does_not_turn_half_of_an_image(
    block: bytes, expected: int
) -> None:
    data = encoded(picture(), "JPEG", exif=block)
    opened = open_image(data, "x")
    assert isinstance(opened, UndecodedJpeg)
    assert opened.size == opened.decode().size == ((64, 96) if expected == 6 else (96, 64))
    assert decode_image(data, "x").size == opened.size


@pytest.mark.parametrize("value", SEEN_IN_THE_WILD)
def test_crops_of_undecoded_jpegs_stay_inside_the_picture(value: int) -> None:
    """The size was once turned and the pixels were not: most of a crop was black."""
    plain = encoded(picture(400, 200), "JPEG", quality=95)
    odd = encoded(picture(400, 200), "JPEG", quality=95, exif=orientation(value))
    transform = TrainTransform(32, "rrc", decode="scaled")
    for position in range(8):
        expected = transform(open_image(plain, "x"), 0, position)
        assert np.array_equal(transform(open_image(odd, "x"), 0, position), expected)
        assert expected[2].min() > 150


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "jpeg"])
@pytest.mark.parametrize("value", [1, 3, 5, 6, 7, 8, 9])
def test_pixels_as_stored_are_those_of_the_file_also_where_pillow_turns_them(
    value: int, compression: str
) -> None:
    plain = encoded(picture(), "TIFF", compression=compression)
    data = encoded(picture(), "TIFF", compression=compression, exif=orientation(min(value, 8)))
    entry = struct.pack("<HHL", 0x0112, SHORT, 1)
    assert data.count(entry) == 1
    data = data.replace(entry + struct.pack("<H", 8), entry + struct.pack("<H", value))  # libtiff writes no 9
    stored = decode_image(data, "x", upright=False)
    assert np.array_equal(np.asarray(stored), np.asarray(decode_image(plain, "x")))
    assert stored_size(data, "x") == ("TIFF", 96, 64)


@pytest.mark.parametrize("value", [1, 6, 9])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_the_stored_size_of_other_formats(form: str, value: int) -> None:
    assert stored_size(encoded(picture(), form, exif=orientation(value)), "x") == (form, 96, 64)


def deep() -> Image.Image:
    return Image.fromarray(np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64))


def clear() -> Image.Image:
    image = picture().convert("RGBA")
    image.putalpha(90)
    return image


ODD_MODES: dict[str, bytes] = {
    "16 bits": encoded(deep(), "PNG"),
    "RGBA": encoded(clear(), "PNG"),
    "LA": encoded(clear().convert("LA"), "PNG"),
    "palette with transparency": encoded(picture().quantize(8), "PNG", transparency=3),
    "RGB with a transparent colour": encoded(picture(), "PNG", transparency=(255, 0, 200)),
    "CMYK": encoded(picture().convert("CMYK"), "JPEG"),
    "animated": encoded(
        picture().quantize(16), "GIF", save_all=True, append_images=[picture().rotate(180).quantize(16)]
    ),
    "animated PNG": encoded(picture(), "PNG", save_all=True, append_images=[picture().rotate(180)]),
    "two pages": encoded(picture(), "TIFF", save_all=True, append_images=[picture(10, 10)]),
}


@pytest.mark.parametrize("mode", ODD_MODES)
def test_an_image_is_the_same_as_a_path_a_url_and_a_pillow_image(mode: str, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(ODD_MODES[mode])
    expected = np.asarray(read_image(tmp_path / "x.bin", "x"))
    for reader in READERS:
        assert np.array_equal(pixels_of(reader, ODD_MODES[mode], "png"), expected), reader
    assert np.array_equal(np.asarray(vlm_image(tmp_path / "x.bin")), expected)


class _Files(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        content = ODD_MODES.get("16 bits" if self.path == "/x.png" else "", b"")
        self.send_response(200 if content else 404)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged."""


def test_an_image_behind_a_url_is_read_as_from_a_file() -> None:
    with HTTPServer(("127.0.0.1", 0), _Files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            expected = np.asarray(decode_image(ODD_MODES["16 bits"], "x"))
            assert np.array_equal(np.asarray(vlm_image(f"{url}/x.png")), expected)
            with pytest.raises(
                UserError, match=r"cannot read an image: .*none\.png: it cannot be fetched: .*404"
            ):
                vlm_image(f"{url}/none.png")
        finally:
            server.shutdown()


@pytest.mark.parametrize("bad", ["data:image/png;base64,@@@", "data:", "data:image/png;base64,aGFsbG8="])
def test_a_data_url_without_an_image_is_one_line(bad: str) -> None:
    with pytest.raises(UserError, match=r"^cannot read an image: [^\n]+$"):
        vlm_image(bad)


@pytest.mark.parametrize("form", ["JPEG", "TIFF", "PNG"])
@pytest.mark.parametrize("value", [*range(1, 9), 9, 256])
def test_a_true_box_of_stored_pixels_lies_where_a_model_sees_it(
    value: int, form: str, tmp_path: Path
) -> None:
    image = Image.new("RGB", (96, 64))
    image.paste((255, 255, 255), (16, 8, 40, 24))
    (tmp_path / "x.bin").write_bytes(encoded(image, form, exif=orientation(value)))
    stored = stored_image(str(tmp_path / "x.bin"))
    assert stored == StoredImage(96, 64, value if value < 9 else 1)
    seen = vlm_image(tmp_path / "x.bin")
    assert seen.size == stored.upright_size
    bounds = seen.convert("L").point([0] * 128 + [255] * 128).getbbox()
    assert bounds == tuple(stored.upright((16, 8, 40, 24)))


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff"])
def test_the_size_of_no_image_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"^the size of the image .*x\.jpg cannot be read: [^\n]+$"):
        stored_image(str(tmp_path / "x.jpg"))
