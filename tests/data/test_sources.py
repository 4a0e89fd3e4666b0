"""Sources return every readable image as upright RGB, and give a reason for every unreadable image."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from localign.data import decoding
from localign.data.sources import (
    FileListSource,
    FolderSource,
    ImageSource,
    UnreadableImage,
    open_source,
    read_image,
)
from localign.errors import UserError

PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet-sample" / "train"


def picture(height: int = 40, width: int = 60, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def write_bad_files(folder: Path) -> dict[str, str]:
    """Write unreadable files; returns name -> a word of the expected reason."""
    picture(200, 200).save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "headless.jpg").write_bytes(whole[:20])
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("this is not a picture")
    picture(100, 100).save(folder / "corrupt.png")
    data = bytearray((folder / "corrupt.png").read_bytes())
    data[41:60] = b"\xff" * 19  # the compressed stream's beginning
    (folder / "corrupt.png").write_bytes(bytes(data))
    return {
        "truncated.jpg": "truncated",
        "headless.jpg": "",
        "zero.jpg": "empty",
        "text.jpg": "not an image",
        "corrupt.png": "",
    }


def test_a_folder_is_read_at_every_depth_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/1.jpeg", "a/deep/er/3.png", "0.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(tmp_path / name)
    (tmp_path / "b" / "notes.txt").write_text("x")
    (tmp_path / "b" / "._1.jpeg").write_bytes(b"resource fork")
    source = FolderSource(tmp_path)
    assert [source.name(i) for i in range(len(source))] == [
        "0.webp",
        "a/deep/er/3.png",
        "b/1.jpeg",
        "b/2.JPG",
    ]
    assert source.load(1).mode == "RGB"
    assert isinstance(source, ImageSource)
    with pytest.raises(IndexError):
        source.name(4)


def test_a_pickled_source_keeps_its_fingerprint(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        picture().save(tmp_path / folder / "ä b.png")
    one, two = FolderSource(tmp_path / "one"), FolderSource(tmp_path / "two")
    again = pickle.loads(pickle.dumps(one))
    assert again.name(0) == "ä b.png"
    assert again.fingerprint() == one.fingerprint() == two.fingerprint()  # the location does not matter
    assert (
        one.fingerprint() != FolderSource(tmp_path / "one", (8, 8)).fingerprint()
    )  # the decoding scale does
    picture().save(tmp_path / "two" / "c.png")
    assert FolderSource(tmp_path / "two").fingerprint() != one.fingerprint()


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    picture().save(tmp_path / "data" / "a" / "x.png")
    picture().save(tmp_path / "elsewhere" / "y.png")
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data" / "a")
    source = FolderSource(tmp_path / "data")
    names = [source.name(i) for i in range(len(source))]
    assert names == ["a/x.png", "out/back/x.png", "out/y.png"]


def test_a_folder_without_images_is_refused_in_one_line_that_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=r"images is empty"):
        FolderSource(tmp_path / "images")
    with pytest.raises(UserError, match=r"no folder .*imagse; did you mean 'images'"):
        FolderSource(tmp_path / "imagse")
    for i in range(3):
        (tmp_path / "images" / f"{i}.txt").write_text("x")
    with pytest.raises(UserError, match=r"no images in the folder .*images: found 3 other files \(3 \.txt\)"):
        open_source(str(tmp_path / "images"))
    with pytest.raises(UserError, match="is a file, not a folder"):
        FolderSource(tmp_path / "images" / "0.txt")


def test_every_bad_file_is_named_with_its_reason_and_no_path(tmp_path: Path) -> None:
    expected = write_bad_files(tmp_path)
    source = FolderSource(tmp_path)
    assert len(source) == len(expected)
    for index in range(len(source)):
        with pytest.raises(UnreadableImage) as caught:
            source.load(index)
        assert caught.value.name == source.name(index)
        assert expected[source.name(index)] in caught.value.reason
        assert caught.value.reason
        assert str(tmp_path) not in caught.value.reason
        assert "\n" not in caught.value.reason
        assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason


def test_truncated_files_stay_unreadable_where_another_library_made_pillow_tolerant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bad_files(tmp_path)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UnreadableImage):
        read_image(tmp_path / "truncated.jpg", "truncated.jpg")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (300, 300)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(decoding, "MAX_PIXELS", 299 * 300)
    with pytest.raises(UnreadableImage, match="300 x 300 pixels"):
        read_image(tmp_path / "bomb.png", "bomb.png")


def test_a_header_that_claims_far_too_much_is_unreadable_too(tmp_path: Path) -> None:
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    with pytest.raises(UnreadableImage, match="pixels"):
        read_image(tmp_path / "bomb.png", "bomb.png")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB"])
def test_opaque_modes_become_rgb_of_the_same_colour(tmp_path: Path, mode: str) -> None:
    suffix = {"CMYK": "jpg", "YCbCr": "jpg", "LAB": "tif"}.get(mode, "png")
    grey = (
        Image.new("RGB", (16, 16), (255, 255, 255)) if mode == "1" else Image.new("RGB", (16, 16), (120,) * 3)
    )
    if mode == "LAB":
        grey = Image.new("LAB", (16, 16), (120, 128, 128))
    (grey if mode == "LAB" else grey.quantize() if mode == "P" else grey.convert(mode)).save(
        tmp_path / f"x.{suffix}"
    )
    image = read_image(tmp_path / f"x.{suffix}", "x")
    assert image.mode == "RGB"
    expected = 255 if mode == "1" else 120
    assert abs(np.asarray(image).astype(int) - expected).max() <= (12 if mode == "LAB" else 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparent_pixels_become_white(tmp_path: Path, mode: str) -> None:
    if mode in ("RGBA", "LA"):
        clear: object = (10, 20, 30, 0) if mode == "RGBA" else (10, 0)
        Image.new(mode, (8, 8), clear).save(tmp_path / "x.png")  # type: ignore[arg-type]
    elif mode == "P":
        image = Image.new("P", (8, 8), 3)
        image.putpalette([7] * 768)
        image.save(tmp_path / "x.png", transparency=3)
    else:
        Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "x.png", transparency=(1, 2, 3))
    assert (np.asarray(read_image(tmp_path / "x.png", "x")) == 255).all()


def test_sixteen_bits_keep_their_upper_eight(tmp_path: Path) -> None:
    values = np.array([[0, 256 * 100, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    assert np.asarray(read_image(tmp_path / "x.png", "x"))[0, :, 0].tolist() == [0, 100, 255]


def test_floating_point_images_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(UnreadableImage, match="floating-point"):
        read_image(tmp_path / "x.tif", "x")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone_as_pillow_does(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(8, 12).save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as raw:
        expected = np.asarray(ImageOps.exif_transpose(raw))
    assert np.array_equal(np.asarray(read_image(tmp_path / "x.png", "x")), expected)


def test_scaled_decoding_keeps_the_resolution_that_the_crop_needs(tmp_path: Path) -> None:
    picture(800, 1200).save(tmp_path / "big.jpg")
    picture(100, 1200).save(tmp_path / "flat.jpg")
    assert read_image(tmp_path / "big.jpg", "x").size == (1200, 800)
    assert FolderSource(tmp_path, (160, 100)).load(0).size == (300, 200)  # 192 are needed
    assert FolderSource(tmp_path, (180, 100)).load(0).size == (600, 400)  # 216 are needed
    assert FolderSource(tmp_path, (96, 96)).load(1).size == (1200, 100)
    assert open_source(str(tmp_path), image_size=(96, 96), scaled_decode=False).load(0).size == (1200, 800)


@pytest.mark.parametrize("suffix", ["txt", "csv"])
def test_a_list_names_its_files_and_what_is_missing(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "images" / "a.png")
    picture().save(tmp_path / "b.png")
    tail = ",7" if suffix == "csv" else ""
    head = "path,label" if suffix == "csv" else "# my images"
    lines = [
        head,
        f"images/a.png{tail}",
        "",
        f"images/gone.png{tail}",
        f"{tmp_path / 'b.png'}{tail}",
        f"b.png{tail}",
    ]
    (tmp_path / f"list.{suffix}").write_text("\n".join(lines) + "\n")
    source = open_source(str(tmp_path / f"list.{suffix}"))
    assert isinstance(source, FileListSource)
    assert [source.name(i) for i in range(4)] == [
        "images/a.png",
        "images/gone.png",
        str(tmp_path / "b.png"),
        "b.png",
    ]
    assert source.missing == ("images/gone.png",)
    with pytest.raises(UnreadableImage, match="no such file"):
        source.load(1)
    assert source.load(2).size == (60, 40)


def test_lists_that_name_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    (tmp_path / "gone.txt").write_text("x.jpg\ny.jpg\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    for name, line in (
        ("empty", "names no images"),
        ("gone", "none of the 2 files .* the first is 'x.jpg'"),
        ("binary", "not a UTF-8 list"),
        ("emtpy", "no file .*; did you mean 'empty.txt'"),
    ):
        with pytest.raises(UserError, match=line):
            open_source(str(tmp_path / f"{name}.txt"))


def test_scenes_open_by_name() -> None:
    pytest.importorskip("localign.data.scenes")
    source = open_source("scenes:val", image_size=(48, 48))
    assert source.kind == "scenes"
    assert source.load(0).size == (48, 48)
    with pytest.raises(UserError, match="square"):
        open_source("scenes", image_size=(48, 64))


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the sample photographs (shared/data) are not here")
def test_the_sample_photographs_are_found_and_read() -> None:
    source = FolderSource(PHOTOS, (224, 224))
    assert len(source) == 900
    assert all(source.load(i).mode == "RGB" for i in range(0, 900, 60))


def test_metadata_never_hides_broken_pixels(tmp_path: Path) -> None:
    """Reading a PNG's metadata loads its pixels: an error there must not end as a blank image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(100, 100).save(tmp_path / "x.png", exif=exif)
    data = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UnreadableImage):
        read_image(tmp_path / "x.png", "x")
