from __future__ import annotations

import pickle

import numpy as np
import pytest

from localign.data import scenes
from localign.data.scenes import SceneConfig, SceneObject, SceneSource, draw_batch, draw_scene, pair_presence
from localign.errors import UserError

CONFIG = SceneConfig()


def test_a_scene_is_a_function_of_config_seed_split_and_index() -> None:
    first, again = draw_scene(CONFIG, 3, 7), draw_scene(CONFIG, 3, 7)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert first.objects == again.objects
    assert first.caption == again.caption
    for other in (draw_scene(CONFIG, 4, 7), draw_scene(CONFIG, 3, 8), draw_scene(CONFIG, 3, 7, "val")):
        assert not np.array_equal(first.image, other.image)


def test_splits_share_no_scene() -> None:
    seen = set()
    for split in scenes.SPLITS:
        images, _ = draw_batch(CONFIG, 0, range(50), split)
        seen |= {image.tobytes() for image in images}
    assert len(seen) == 50 * len(scenes.SPLITS)


def test_a_batch_holds_the_scenes_drawn_one_by_one() -> None:
    images, labels = draw_batch(CONFIG, 1, [5, 2])
    for row, index in enumerate((5, 2)):
        scene = draw_scene(CONFIG, 1, index)
        np.testing.assert_array_equal(images[row], scene.image)
        np.testing.assert_array_equal(labels[row], scene.labels)


@pytest.mark.parametrize("index", range(40))
def test_labels_boxes_and_objects_tell_the_same_story(index: int) -> None:
    scene = draw_scene(CONFIG, 0, index)
    assert scene.image.shape == (CONFIG.image_size, CONFIG.image_size, 3)
    assert scene.image.dtype == scene.labels.dtype == np.uint8
    assert CONFIG.min_objects <= len(scene.objects) <= CONFIG.max_objects
    assert len({o.name for o in scene.objects}) == len(scene.objects)
    codes = set(np.unique(scene.labels).tolist()) - {0}
    assert codes == {CONFIG.code(o.shape, o.color) for o in scene.objects}
    for thing in scene.objects:
        rows, columns = np.nonzero(scene.labels == CONFIG.code(thing.shape, thing.color))
        assert thing.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert CONFIG.classes[CONFIG.code(thing.shape, thing.color)] == thing.name


def test_object_pixels_have_the_objects_colour() -> None:
    plain = SceneConfig(noise=0, color_jitter=0)
    for index in range(20):
        scene = draw_scene(plain, 0, index)
        for thing in scene.objects:
            pixels = scene.image[scene.labels == plain.code(thing.shape, thing.color)]
            assert np.unique(pixels, axis=0).tolist() == [list(scenes.PALETTE[thing.color])]


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_shapes_are_told_apart_at_the_smallest_size(shape: str) -> None:
    masks = {name: scenes._stencil(name, 12)[0] for name in scenes.SHAPES}
    mine = masks.pop(shape)
    assert mine.sum() > 20
    for other in masks.values():
        assert (mine != other).mean() > 0.08


def test_attribute_table_gives_a_pair_its_shape_and_its_colour() -> None:
    table = CONFIG.attribute_table()
    assert table.shape == (len(CONFIG.classes), len(CONFIG.attributes))
    assert CONFIG.classes[0] == CONFIG.attributes[0] == scenes.GROUND
    for code, name in enumerate(CONFIG.classes):
        held = {CONFIG.attributes[i] for i in np.flatnonzero(table[code])}
        assert held == set(name.split())


def test_pair_presence_is_the_set_of_objects() -> None:
    _, labels = draw_batch(CONFIG, 0, range(30))
    present = pair_presence(CONFIG, labels)
    assert present.shape == (30, len(CONFIG.classes) - 1)
    for index in range(30):
        names = {CONFIG.classes[i + 1] for i in np.flatnonzero(present[index])}
        assert names == {o.name for o in draw_scene(CONFIG, 0, index).objects}
    np.testing.assert_array_equal(pair_presence(CONFIG, labels[4]), present[4])


def test_relations_follow_the_longer_axis() -> None:
    origin = SceneObject("circle", "red", (0, 0, 4, 4))
    assert scenes.relation(origin, SceneObject("square", "blue", (10, 5, 14, 9))) == "left of"
    assert scenes.relation(origin, SceneObject("square", "blue", (5, 10, 9, 14))) == "above"
    assert scenes.relation(SceneObject("square", "blue", (5, 10, 9, 14)), origin) == "below"
    assert scenes.relation(SceneObject("square", "blue", (10, 5, 14, 9)), origin) == "right of"


def test_captions_name_every_object_and_the_first_relation() -> None:
    things = (
        SceneObject("circle", "red", (0, 0, 4, 4)),
        SceneObject("square", "blue", (10, 5, 14, 9)),
        SceneObject("cross", "orange", (20, 20, 24, 24)),
        SceneObject("ring", "green", (30, 30, 34, 34)),
    )
    captions = [scenes.caption_of(things[:n]) for n in range(5)]
    assert captions == [
        "an empty ground",
        "a red circle",
        "a red circle left of a blue square",
        "a red circle left of a blue square, and an orange cross",
        "a red circle left of a blue square, an orange cross and a green ring",
    ]


def test_the_source_serves_named_labelled_scenes() -> None:
    source = SceneSource(CONFIG, "val", length=3, seed=2)
    assert len(source) == 3
    assert [source.name(i) for i in range(3)] == ["scene-0", "scene-1", "scene-2"]
    image, labels = source.load_labelled(1)
    scene = draw_scene(CONFIG, 2, 1, "val")
    np.testing.assert_array_equal(np.asarray(image), scene.image)
    np.testing.assert_array_equal(labels, scene.labels)
    assert source.load(1).mode == "RGB"
    assert source.classes == CONFIG.classes
    with pytest.raises(IndexError):
        source.load(3)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint() == source.fingerprint()


def test_fingerprints_differ_wherever_the_images_may() -> None:
    sources = [
        SceneSource(CONFIG),
        SceneSource(CONFIG, seed=1),
        SceneSource(CONFIG, "val"),
        SceneSource(CONFIG, length=10),
        SceneSource(SceneConfig(noise=CONFIG.noise + 1)),
    ]
    assert len({s.fingerprint() for s in sources}) == len(sources)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": ("circel",)}, "did you mean 'circle'"),
        ({"colors": ()}, "must be one or more different names"),
        ({"min_objects": 5, "max_objects": 4}, "min_objects <= max_objects"),
        ({"max_object_size": 100}, "max_object_size <= image_size"),
        ({"noise": 128}, "noise"),
        ({"texture_cells": 1}, "texture_cells"),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SceneConfig(**change)  # type: ignore[arg-type]


def test_unknown_splits_are_refused() -> None:
    with pytest.raises(UserError, match="no split 'valid'"):
        SceneSource(CONFIG, "valid")
