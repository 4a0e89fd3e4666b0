"""Label maps are read as their files store them, and ignored pixels belong to no label and count nowhere."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from probing_toys import CLASSES, CONFIG, FakeBackbone
from torch import Tensor

from localign.errors import UserError
from localign.options.names import Cache
from localign.options.probe import HeadSpec, ProbeCommandConfig
from localign.probing import PackedLabels, PatchLabels, probe_heads, reduce_labels
from localign.probing.classes import ade20k, class_table, coco_stuff
from localign.probing.datasets import open_labelled
from localign.probing.metrics import MajorityCounts, MultiLabelCounts
from localign.probing.segmentation import FolderSegmentation, labelled_batches
from localign.probing.suite import check_labels
from localign.probing.training import head_loss

GREY, PALETTE = 0, 3
DEPTHS = [*((GREY, depth) for depth in (1, 2, 4, 8, 16)), *((PALETTE, depth) for depth in (1, 2, 4, 8))]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">L", len(content)) + kind + content + struct.pack(">L", zlib.crc32(kind + content))


def png(values: NDArray[Any], colour: int, depth: int, *extra: bytes) -> bytes:
    """A PNG file with these samples, written without Pillow."""
    height, width = values.shape
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in values]
    else:
        bits = ((values[..., None] >> np.arange(depth - 1, -1, -1)) & 1).reshape(height, -1).astype(np.uint8)
        rows = [row.tobytes() for row in np.packbits(bits, axis=1)]
    header = struct.pack(">LLBBBBB", width, height, depth, colour, 0, 0, 0)
    palette = [chunk(b"PLTE", bytes(range(255, -1, -1)) * 3)] if colour == PALETTE and depth == 8 else []
    if colour == PALETTE and depth < 8:
        palette = [chunk(b"PLTE", bytes(3 * 2**depth))]  # all black
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [chunk(b"IHDR", header), *palette, *extra, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def folder_of(
    root: Path, maps: dict[str, bytes], classes: object, size: tuple[int, int] = (16, 16)
) -> FolderSegmentation:
    for folder in ("images", "masks"):
        (root / folder / "train").mkdir(parents=True)
        (root / folder / "val").symlink_to("train")
    for stem, data in maps.items():
        image = np.random.default_rng(len(stem)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(image).save(root / "images" / "train" / f"{stem}.png")
        (root / "masks" / "train" / f"{stem}.png").write_bytes(data)
    (root / "classes.json").write_text(json.dumps(classes))
    return FolderSegmentation(root / "images" / "train", root / "masks" / "train", root / "classes.json")


def all_values(depth: int) -> NDArray[np.int64]:
    count = 2 ** min(depth, 8)
    values = np.resize(np.arange(count), (16, 16))
    return values * 257 if depth == 16 else values


@pytest.mark.parametrize("extra", [(), (chunk(b"gAMA", struct.pack(">L", 45455)),), (chunk(b"sBIT", b"\1"),)])
@pytest.mark.parametrize(("colour", "depth"), DEPTHS)
def test_every_value_of_every_depth_is_read_as_stored(
    colour: int, depth: int, extra: tuple[bytes, ...], tmp_path: Path
) -> None:
    values = all_values(depth)
    classes = [str(i) for i in range(int(values.max()) + 1)]
    source = folder_of(
        tmp_path,
        {"a": png(values, colour, depth, *extra)},
        {"ignore": None, **{str(i): name for i, name in enumerate(classes)}},
    )
    assert np.array_equal(source.load_labelled(0)[1], values)


@pytest.mark.parametrize("transparent", [b"\0\1", b"\0\0"])
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_a_transparent_level_is_a_value_like_any_other(
    depth: int, transparent: bytes, tmp_path: Path
) -> None:
    values = all_values(depth)
    data = png(values, GREY, depth, chunk(b"tRNS", transparent))
    source = folder_of(tmp_path, {"a": data}, [str(i) for i in range(256)])
    assert np.array_equal(source.load_labelled(0)[1], values)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_maps_that_pillow_writes_with_few_bits_are_read_as_the_palette_has_them(
    bits: int, tmp_path: Path
) -> None:
    image = Image.fromarray(all_values(bits).astype(np.uint8)).convert("P")
    image.putpalette([7] * 768)
    image.save(tmp_path / "map.png", bits=bits)
    source = folder_of(tmp_path, {"a": (tmp_path / "map.png").read_bytes()}, [str(i) for i in range(256)])
    assert np.array_equal(source.load_labelled(0)[1], all_values(bits))


@pytest.mark.parametrize("bad", [5, 9, 15])
def test_an_error_names_the_value_in_the_file(bad: int, tmp_path: Path) -> None:
    source = folder_of(tmp_path, {"a": png(np.full((16, 16), bad), GREY, 4)}, ["nothing", "cat"])
    with pytest.raises(UserError, match=rf"a\.png holds values .*--ignore.*: \[{bad}\]$"):
        source.load_labelled(0)


# --- the value of pixels to ignore


def with_ignored(value: int) -> NDArray[np.int64]:
    """16 x 16 pixels, four patches: cats; cats and ignored pixels; ignored pixels; nothing and ignored pixels."""
    values = np.full((16, 16), 1)
    values[:8, 10:] = value
    values[8:, :] = value
    values[8:, 8:10] = 0
    return values


@pytest.mark.parametrize(
    ("classes", "ignore", "value", "depth"),
    [
        (["nothing", "cat"], None, 255, 8),
        ({"0": "nothing", "1": "cat", "ignore": 7}, None, 7, 4),
        ({"0": "nothing", "1": "cat", "ignore": 7}, 9, 9, 4),
        ({"0": "nothing", "1": "cat", "ignore": None}, 3, 3, 2),
        ({"0": "nothing", "1": "cat", "2": "dog"}, 2, 2, 2),
        ({"0": "nothing", "1": "cat"}, 65535, 65535, 16),
        ({"0": "nothing", "1": "cat", "300": "dog"}, None, 255, 16),
        ({"0": "nothing", "1": "cat", "255": "dog"}, 65535, 65535, 16),
    ],
)
def test_ignored_pixels_belong_to_no_label(
    classes: object, ignore: int | None, value: int, depth: int, tmp_path: Path
) -> None:
    folder_of(tmp_path, {"a": png(with_ignored(value), GREY, depth)}, classes)
    source = open_labelled(tmp_path, "train", ignore=ignore)
    _, maps = next(labelled_batches(source, (16, 16), 1))
    count = len(source.classes)
    assert maps.max() == count
    labels = reduce_labels(maps, 8, count, ignores=True)
    assert labels.patch[0, :, :2].int().tolist() == [[0, 1], [0, 1], [0, 0], [1, 0]]
    assert labels.image[0, :2].tolist() == [True, True]
    assert labels.patch[..., 2:].any() == labels.image[..., 2:].any() == False  # noqa: E712
    assert labels.majority.tolist() == [[1, 1, -1, 0]]
    assert labels.counted is not None
    assert labels.counted.tolist() == [[True, True, False, True]]


@pytest.mark.parametrize(
    ("classes", "values"),
    [
        ([str(i) for i in range(256)], [255]),
        ({"0": "nothing", "255": "void", "ignore": None}, [255]),
        (["nothing", "cat"], [1]),
    ],
)
def test_no_value_is_ignored_where_it_is_a_class(classes: object, values: list[int], tmp_path: Path) -> None:
    source = folder_of(tmp_path, {"a": png(np.full((16, 16), values[0]), GREY, 8)}, classes)
    labels = source.load_labelled(0)[1]
    assert labels.dtype == np.uint8
    assert (int(labels.min()), int(labels.max())) == (values[0], values[0])


@pytest.mark.parametrize("value", [200, 255])
def test_other_values_are_still_refused(value: int, tmp_path: Path) -> None:
    data = png(np.full((16, 16), value), GREY, 8)
    source = folder_of(tmp_path, {"a": data}, {"0": "nothing", "1": "cat", "ignore": 254})
    with pytest.raises(UserError, match=rf"\[{value}\]"):
        source.load_labelled(0)


def test_published_tables_read_their_maps_as_before() -> None:
    coco, ade = coco_stuff(), ade20k()
    assert (coco.ignore, coco_stuff(things_only=True).ignore, ade.ignore) == (None, None, 255)
    values = np.array([0, 91, 181, 255], dtype=np.uint8)
    assert coco.classes_of(values).tolist() == [1, 92, 182, 0]
    assert ade.classes_of(np.arange(151, dtype=np.uint8)).tolist() == list(range(151))
    assert coco.ignoring(255).classes_of(values).tolist() == [1, 92, 182, 183]
    assert coco.classes_of(values).dtype == ade.classes_of(values[:1]).dtype == np.uint8


@pytest.mark.parametrize("value", ['"255"', "2.5", "true", "[]", "-1", "70000"])
def test_a_value_to_ignore_that_no_pixel_has_is_one_line(value: str, tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text(f'{{"0": "nothing", "ignore": {value}}}')
    with pytest.raises(UserError, match="the value to ignore"):
        class_table(tmp_path / "classes.json")


def test_scenes_have_no_value_to_ignore() -> None:
    with pytest.raises(UserError, match="--ignore"):
        ProbeCommandConfig(ignore=255)
    with pytest.raises(UserError, match="--ignore"):
        open_labelled("scenes", "train", ignore=255)


def test_the_fingerprint_of_data_without_a_value_to_ignore_is_that_of_older_versions(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    data = {"a": png(np.full((16, 16), 1), GREY, 8)}
    default = folder_of(tmp_path / "a", data, ["nothing", "cat"])
    none = folder_of(tmp_path / "b", data, {"0": "nothing", "1": "cat", "ignore": None})
    assert default.fingerprint() == none.fingerprint()
    other = FolderSegmentation(default.images_dir, default.masks_dir, default.table.ignoring(1))
    assert other.fingerprint() != default.fingerprint()


def random_maps(codes: int, ignored: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(0, codes, (3, 12, 16), generator=generator)
    maps[torch.rand(maps.shape, generator=generator) < ignored] = codes
    maps[1, :4, :4] = codes
    return maps


@pytest.mark.parametrize("codes", [2, 5, 255, 256, 1000])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.9, 1.0])
def test_targets_equal_their_definition_over_the_other_pixels(codes: int, share: float) -> None:
    maps = random_maps(codes, share)
    labels = reduce_labels(maps, 4, codes, ignores=True)
    patches = maps.unfold(1, 4, 4).unfold(2, 4, 4).reshape(3, 12, 16)
    for b in range(3):
        seen: set[int] = set()
        for n in range(12):
            kept = patches[b, n][patches[b, n] < codes]
            seen |= set(kept.tolist())
            counts = torch.bincount(kept, minlength=codes)
            assert labels.majority[b, n] == (int(counts.argmax()) if len(kept) else -1)
            present = set(kept.tolist()) - ({0} if len(set(kept.tolist())) > 1 else set())
            assert set(labels.patch[b, n].nonzero().flatten().tolist()) == present
        assert set(labels.image[b].nonzero().flatten().tolist()) == seen
    assert labels.partial is True


def test_maps_without_ignored_pixels_give_the_targets_of_a_source_that_has_none() -> None:
    maps = torch.randint(0, 5, (3, 12, 16))
    one, other = reduce_labels(maps, 4, 5), reduce_labels(maps, 4, 5, ignores=True)
    assert other.partial is False
    assert all(torch.equal(getattr(one, n), getattr(other, n)) for n in ("patch", "image", "majority"))


@pytest.mark.parametrize("codes", [5, 40_000])
def test_packed_targets_keep_what_is_ignored(codes: int) -> None:
    maps = random_maps(codes, 0.1)[:, :8, :8]
    labels = reduce_labels(maps, 4, codes, ignores=True)
    packed = PackedLabels.cat([PackedLabels.pack(labels), PackedLabels.pack(labels)])
    again = packed[torch.arange(3)].unpack(torch.device("cpu"))
    assert again.partial
    assert torch.equal(again.majority, labels.majority)
    assert torch.equal(again.patch, labels.patch)


# --- losses and metrics are those of the counted patches alone


def partial_labels() -> tuple[Tensor, PatchLabels, Tensor]:
    """Logits ``(6, 4, C)``, targets, and the patches that count; nothing counts in the last image."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 4, CLASSES, generator=generator)
    codes = torch.randint(0, CLASSES, (6, 4), generator=generator)
    counted = torch.rand(6, 4, generator=generator) > 0.4
    counted[5], counted[0] = False, True
    patch = torch.nn.functional.one_hot(codes, CLASSES).bool() & counted[..., None]
    majority = torch.where(counted, codes, -1)
    return logits, PatchLabels(patch, patch.any(1), majority, CLASSES, partial=True), counted


def test_losses_are_means_over_what_counts() -> None:
    logits, labels, counted = partial_labels()
    kept = PatchLabels(
        labels.patch[counted][:, None], labels.image[:5], labels.majority[counted][:, None], CLASSES
    )
    for task in ("local", "majority"):
        spec = HeadSpec("linear", task)
        assert torch.allclose(
            head_loss(spec, logits, labels), head_loss(spec, logits[counted][:, None], kept)
        )
    spec = HeadSpec("linear", "global")
    assert torch.allclose(head_loss(spec, logits[:, 0], labels), head_loss(spec, logits[:5, 0], kept))
    nothing = PatchLabels(labels.patch[5:], labels.image[5:], labels.majority[5:], CLASSES, partial=True)
    for task in ("local", "majority", "global"):
        wanted = logits[5:, 0] if task == "global" else logits[5:]
        assert head_loss(HeadSpec("linear", task), wanted, nothing) == 0.0


def test_metrics_count_what_counts() -> None:
    logits, labels, counted = partial_labels()
    ours, plain = MultiLabelCounts(CLASSES), MultiLabelCounts(CLASSES)
    hits, positives = ours.update(logits, labels.patch, counted=labels.counted)
    for b in range(5):
        plain.update(logits[b][counted[b]][None], labels.patch[b][counted[b]][None])
    assert ours.compute() == plain.compute()
    assert hits[5].sum() == positives[5].sum() == 0
    ours, plain = MultiLabelCounts(CLASSES), MultiLabelCounts(CLASSES)
    ours.update(logits[:, 0], labels.image, labels.patch, labels.counted)
    for b in range(5):
        plain.update(logits[b, :1], labels.image[b][None], labels.patch[b][counted[b]][None])
    assert ours.compute() == plain.compute()
    majority, plain_majority = MajorityCounts(CLASSES), MajorityCounts(CLASSES)
    majority.update(logits, labels.majority)
    plain_majority.update(logits[counted][None], labels.majority[counted][None])
    assert majority.compute() == plain_majority.compute()


def test_two_ranks_weigh_counted_patches_as_one() -> None:
    """Each rank's loss is multiplied by its part of the patches that count over all ranks."""
    from localign.probing.training.losses import counted_units, task_shares

    logits, labels, _ = partial_labels()
    whole = counted_units(labels)
    halves = [(logits[:3], labels[slice(0, 3)]), (logits[3:], labels[slice(3, 6)])]
    for task in ("local", "majority", "global"):
        spec, index = HeadSpec("linear", task), (0 if task == "global" else slice(None))
        parts = [task_shares(y, whole)[task] * head_loss(spec, x[:, index], y) for x, y in halves]
        assert torch.allclose(sum(parts), head_loss(spec, logits[:, index], labels))  # type: ignore[arg-type]


@pytest.mark.parametrize("cache", ["none", "device", "disk"])
def test_probing_with_ignored_pixels_is_the_same_in_every_cache(cache: Cache, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    maps = {}
    for number in range(6):
        values = np.kron(rng.integers(0, 3, (2, 2)), np.ones((4, 4), dtype=int))
        values[:4, :4] = 255
        if number == 4:
            values[:] = 255
        maps[f"{number}"] = png(values, GREY, 8)
    source = folder_of(tmp_path / "data", maps, ["nothing", "cat", "dog"], size=(8, 8))
    config = replace(
        CONFIG, steps=4, batch=4, warmup_steps=1, cache=cache, heads=("linear",), extract_batch=2
    )
    config = replace(config, tasks=("local", "global", "majority"), cache_dtype="float32", curve_images=3)
    probed = probe_heads(FakeBackbone(), source, source, config, cache_folder=tmp_path / "cache")[0]  # type: ignore[arg-type]
    results = probed.outcome["results"]["val"]["linear"]
    counted = 5 * 3
    assert sum(results["majority"]["class_positives"]) == counted
    assert sum(results["local"]["class_positives"]) == counted
    accuracy = results["local"]["accuracy"]
    assert accuracy is not None
    decisions = accuracy * counted * 3  # a whole number of patches and classes
    assert decisions == pytest.approx(round(decisions))
    if cache != "none":
        live = replace(config, cache="none")
        again = probe_heads(FakeBackbone(), source, source, live)[0]  # type: ignore[arg-type]
        assert again.outcome["results"] == probed.outcome["results"]
        assert again.outcome["train"] == probed.outcome["train"]


def test_images_of_ignored_pixels_only_have_no_label_to_learn(tmp_path: Path) -> None:
    source = folder_of(tmp_path, {"a": png(np.full((16, 16), 255), GREY, 8)}, ["nothing", "cat"])
    with pytest.raises(
        UserError, match=r"no image .* has a positive label: all pixels are 'nothing' or ignored"
    ):
        check_labels("train", source, (16, 16))


@pytest.mark.parametrize("before", [b"", chunk(b"tEXt", b"Comment\0hello")])
def test_a_map_with_two_headers_or_a_late_one_is_refused(before: bytes, tmp_path: Path) -> None:
    """The first header says 2 bits, the second 8: no reading of such a file is right."""
    data = png(np.full((16, 16), 3), GREY, 8)
    other = chunk(b"IHDR", struct.pack(">LLBBBBB", 16, 16, 2, GREY, 0, 0, 0))
    source = folder_of(tmp_path, {"a": data[:8] + before + other + data[8:]}, ["a", "b", "c", "d"])
    with pytest.raises(UserError, match="cannot read the label map"):
        source.load_labelled(0)
