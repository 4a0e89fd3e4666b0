"""Folders of images and label maps: what is read, and what is refused by name."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from localign.data.scenes import SceneSource
from localign.errors import UserError
from localign.probing.segmentation import (
    AttributeLabels,
    FolderSegmentation,
    LabelledSource,
    labelled_batches,
)

SAMPLE = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco-sample"
TABLE = {"0": "unlabeled", "1": "cat", "3": "dog"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images of 8 x 6 pixels: left half a cat, right half a dog."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    mask = np.ones((6, 8), dtype=np.uint8)
    mask[:, 4:] = 3
    for stem in ("a", "b"):
        Image.fromarray(np.repeat(mask[..., None] * 60, 3, axis=2)).save(tmp_path / "images" / f"{stem}.jpg")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{stem}.png")
    (tmp_path / "classes.json").write_text(json.dumps(TABLE))
    return tmp_path


def open_folder(folder: Path) -> FolderSegmentation:
    return FolderSegmentation(folder / "images", folder / "masks", folder / "classes.json")


def test_reads_pairs_and_the_class_table_with_its_gaps(folder: Path) -> None:
    source = open_folder(folder)
    assert isinstance(source, LabelledSource)
    assert (len(source), source.name(1)) == (2, "b.jpg")
    assert source.classes == ("unlabeled", "cat", "(no class 2)", "dog")
    image, labels = source.load_labelled(0)
    assert (image.mode, image.size, labels.shape) == ("RGB", (8, 6), (6, 8))
    assert np.unique(labels).tolist() == [1, 3]
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint() == source.fingerprint()
    other = FolderSegmentation(folder / "images", folder / "masks", ["unlabeled", "cat", "cow", "dog"])
    assert other.fingerprint() != source.fingerprint()


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_show_the_largest_centre_square(folder: Path, workers: int) -> None:
    batches = list(labelled_batches(open_folder(folder), (4, 4), batch=2, workers=workers))
    assert len(batches) == 1
    images, labels = batches[0]
    assert (images.shape, images.dtype) == ((2, 3, 4, 4), torch.uint8)
    assert labels[0].tolist() == [[1, 1, 3, 3]] * 4
    assert images[0, 0, 0, 0] < 100 < images[0, 0, 0, 3]


def test_a_missing_label_map_is_named(folder: Path) -> None:
    (folder / "masks" / "b.png").unlink()
    with pytest.raises(UserError, match=r"1 of 2 images have no label map; .*masks/b\.png"):
        open_folder(folder)


def test_a_label_map_of_another_size_is_named(folder: Path) -> None:
    Image.new("L", (8, 5)).save(folder / "masks" / "b.png")
    with pytest.raises(UserError, match=r"b\.png has 8 x 5 pixels, its image 8 x 6"):
        open_folder(folder).load_labelled(1)


@pytest.mark.parametrize("bad", [2, 200])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_id_outside_the_table_is_named(folder: Path, bad: int, workers: int) -> None:
    Image.new("L", (8, 6), bad).save(folder / "masks" / "b.png")
    with pytest.raises(UserError, match=rf"^the label map .*b\.png holds values .*\[{bad}\]$"):
        list(labelled_batches(open_folder(folder), (4, 4), batch=2, workers=workers))


def test_coloured_or_broken_label_maps_and_images_are_named(folder: Path) -> None:
    Image.new("RGB", (8, 6)).save(folder / "masks" / "a.png")
    with pytest.raises(UserError, match=r"a\.png has 3 channels"):
        open_folder(folder).load_labelled(0)
    (folder / "masks" / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read the label map .*a\.png: not a PNG image"):
        open_folder(folder).load_labelled(0)


def test_an_unreadable_image_ends_the_probing_by_name(folder: Path) -> None:
    (folder / "images" / "b.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"unreadable image: b\.jpg: empty file"):
        list(labelled_batches(open_folder(folder), (4, 4), batch=1))


def test_folders_and_tables_that_are_not_there(folder: Path) -> None:
    with pytest.raises(UserError, match="cannot list the folder"):
        FolderSegmentation(folder / "image", folder / "masks", TABLE)
    with pytest.raises(UserError, match="cannot read the class table"):
        FolderSegmentation(folder / "images", folder / "masks", folder / "none.json")
    with pytest.raises(UserError, match="no images"):
        FolderSegmentation(folder / "masks" / "..", folder / "masks", TABLE)
    with pytest.raises(UserError, match="at least one id"):
        FolderSegmentation(folder / "images", folder / "masks", {})
    with pytest.raises(UserError, match=r"needs ids and names: .*'cat'"):
        FolderSegmentation(folder / "images", folder / "masks", {"cat": 1})


def test_a_class_may_say_whether_it_is_a_thing(folder: Path) -> None:
    assert open_folder(folder).class_kinds is None
    table: dict[str, object] = {**TABLE, "1": {"name": "cat", "kind": "thing"}}
    (folder / "classes.json").write_text(json.dumps(table))
    source = open_folder(folder)
    assert source.classes == ("unlabeled", "cat", "(no class 2)", "dog")
    assert source.class_kinds == ("other", "thing", "other", "other")
    (folder / "classes.json").write_text(json.dumps({**TABLE, "1": {"name": "cat", "kind": "animal"}}))
    with pytest.raises(
        UserError, match=r"classes\.json needs ids and names: .*animal.* a kind other than thing, stuff"
    ):
        open_folder(folder)


def test_names_are_matched_by_stem_whatever_the_ending(folder: Path) -> None:
    Image.new("RGB", (8, 6)).save(folder / "images" / "c.d.webp")
    Image.new("L", (8, 6), 1).save(folder / "masks" / "c.d.PNG", format="PNG")
    (folder / "masks" / "a_extra.png").write_bytes(b"belongs to no image")
    (folder / "images" / "notes.txt").write_text("no image")
    source = open_folder(folder)
    assert [source.name(i) for i in range(len(source))] == ["a.jpg", "b.jpg", "c.d.webp"]
    assert source.load_labelled(2)[1].tolist() == [[1] * 8] * 6
    Image.new("RGB", (8, 6)).save(folder / "images" / "a.png")
    with pytest.raises(UserError, match=r"a\.jpg and a\.png in .* share the label map a\.png"):
        open_folder(folder)


def test_images_and_label_maps_may_lie_in_one_folder(folder: Path) -> None:
    for mask in (folder / "masks").iterdir():
        mask.rename(folder / "images" / mask.name)
    source = FolderSegmentation(folder / "images", folder / "images", TABLE)
    assert [source.name(i) for i in range(len(source))] == ["a.jpg", "b.jpg"]
    assert source.load_labelled(1)[1][0].tolist() == [1] * 4 + [3] * 4


def test_a_label_map_belongs_to_the_pixels_as_stored(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    picture = np.zeros((6, 8, 3), dtype=np.uint8)
    picture[:, 4:] = 255
    Image.fromarray(picture).save(folder / "images" / "a.jpg", exif=exif, quality=95)
    image, labels = open_folder(folder).load_labelled(0)
    assert image.size == (8, 6)
    assert ((np.asarray(image)[..., 0] > 128) == (labels == 3)).all()


@pytest.mark.parametrize(("classes", "dtype"), [(4, torch.uint8), (300, torch.int64)])
def test_label_maps_of_one_or_two_bytes(folder: Path, classes: int, dtype: torch.dtype) -> None:
    if classes > 256:
        for stem in ("a", "b"):
            Image.fromarray(np.full((6, 8), 299, dtype=np.uint16)).save(folder / "masks" / f"{stem}.png")
    names = [f"class {i}" for i in range(classes)]
    source = FolderSegmentation(folder / "images", folder / "masks", names)
    _, labels = next(labelled_batches(source, (4, 4), batch=2))
    assert labels.dtype == dtype
    assert labels.max() == classes - 1


def test_the_fingerprint_follows_names_tables_and_content(folder: Path, tmp_path: Path) -> None:
    first = open_folder(folder).fingerprint()
    assert open_folder(folder).fingerprint() == first
    moved = folder.rename(tmp_path.with_name(tmp_path.name + "-moved"))
    assert open_folder(moved).fingerprint() == first
    (moved / "classes.json").write_text(json.dumps({**TABLE, "2": "cow"}))
    named = open_folder(moved).fingerprint()
    Image.new("L", (8, 6), 1).save(moved / "masks" / "b.png")
    annotated = open_folder(moved).fingerprint()
    (moved / "images" / "b.jpg").rename(moved / "images" / "b.jpeg")
    renamed = open_folder(moved).fingerprint()
    assert len({first, named, annotated, renamed}) == 4


def test_scenes_are_labelled_sources_by_pair_and_by_attribute() -> None:
    scenes = SceneSource(length=3)
    assert isinstance(scenes, LabelledSource)
    attributes = AttributeLabels(scenes, scenes.config.attributes, scenes.config.attribute_table())
    assert isinstance(attributes, LabelledSource)
    assert attributes.fingerprint() != scenes.fingerprint()
    assert attributes.load_labelled(1)[1].tolist() == scenes.load_labelled(1)[1].tolist()
    assert pickle.loads(pickle.dumps(attributes)).classes == scenes.config.attributes


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the sample data beside the repository is missing")
def test_reads_the_coco_sample() -> None:
    source = FolderSegmentation(
        SAMPLE / "images" / "val2017", SAMPLE / "masks" / "val2017", SAMPLE / "classes.json"
    )
    assert (len(source), len(source.classes), source.classes[0]) == (100, 201, "unlabeled")
    image, labels = source.load_labelled(0)
    assert labels.shape == (image.height, image.width)
