"""Patch and image labels mean what the benchmark says, and equal the published code's."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from localign.data.transforms import EvalTransform
from localign.probing.labels import reduce_labels

SHARED = Path(__file__).resolve().parents[3] / "shared"
SCORES = SHARED / "golden" / "scores"
MASKS = SHARED / "data" / "coco-sample" / "masks" / "val2017"
needs_goldens = pytest.mark.skipif(
    not (SCORES.is_dir() and MASKS.is_dir()), reason="the sample data beside the repository is missing"
)


def patch_union(maps: Tensor, patch: int, classes: int, attributes: Tensor | None = None) -> Tensor:
    return reduce_labels(maps, patch, classes, attributes).patch


def image_union(maps: Tensor, patch: int, classes: int) -> Tensor:
    return reduce_labels(maps, patch, classes).image


def patch_majority(maps: Tensor, patch: int, codes: int) -> Tensor:
    return reduce_labels(maps, patch, codes).majority


def slow_labels(maps: Tensor, patch: tuple[int, int], classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, patch by patch: union, image union and majority."""
    height, width = patch
    rows, columns = maps.shape[1] // height, maps.shape[2] // width
    union = torch.zeros(len(maps), rows * columns, classes, dtype=torch.bool)
    image_union = torch.zeros(len(maps), classes, dtype=torch.bool)
    majority = torch.zeros(len(maps), rows * columns, dtype=torch.int64)
    for image in range(len(maps)):
        for r in range(rows):
            for c in range(columns):
                piece = maps[image, r * height : (r + 1) * height, c * width : (c + 1) * width]
                found, counts = torch.unique(piece, return_counts=True)
                found = found.long()
                majority[image, r * columns + c] = found[counts.argmax()]
                image_union[image, found] = True
                union[image, r * columns + c, found[found > 0] if len(found) > 1 else found] = True
    return union, image_union, majority


@needs_goldens
@pytest.mark.parametrize(("size", "patch"), [(224, 16), (336, 14), (384, 14)])
def test_equal_to_the_published_labels(size: int, patch: int) -> None:
    from safetensors.torch import load_file

    golden = load_file(str(SCORES / "probing.safetensors"))
    files = json.loads((SCORES / "probing.json").read_text())["files"]
    view = EvalTransform(size, mode="square")
    maps = torch.stack([view.labels(np.asarray(Image.open(MASKS / name))) for name in files])
    name = f"labels.{size}.{patch}"
    union = golden[f"{name}.union"].flatten(1, 2).bool()
    assert torch.equal(patch_union(maps, patch, 201), union)
    assert torch.equal(image_union(maps, patch, 201), golden[f"{name}.global-union"].bool())
    assert torch.equal(patch_majority(maps, patch, 201), golden[f"{name}.majority"].flatten(1).long())
    together = reduce_labels(maps, patch, 201)
    assert torch.equal(together.patch, union)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
@pytest.mark.parametrize("patch", [(4, 4), (3, 5), (7, 2), (1, 1)])
def test_equal_to_the_definition_on_any_grid_with_spare_pixels(
    dtype: torch.dtype, patch: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 6, (3, 17, 23), generator=generator).to(dtype)
    labels = reduce_labels(maps, patch, 6)
    for fast, slow in zip(
        (labels.patch, labels.image, labels.majority), slow_labels(maps, patch, 6), strict=True
    ):
        assert torch.equal(fast, slow)


def test_unlabeled_counts_only_alone_in_a_patch_but_always_in_the_image() -> None:
    maps = torch.zeros(1, 2, 6, dtype=torch.uint8)
    maps[0, 0, 0] = 3  # the first patch holds 0 and 3, the second only 0, the third only 2
    maps[0, :, 4:] = 2
    union = patch_union(maps, 2, 4)[0]
    assert union.int().tolist() == [[0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 1, 0]]
    assert image_union(maps, 2, 4)[0].tolist() == [True, False, True, True]
    mixed = patch_union(maps[:, :, :2], 2, 4)
    assert not mixed[..., 0].any()
    assert image_union(maps[:, :, :2], 2, 4)[0].tolist() == [True, False, False, True]


def test_spare_pixels_belong_to_no_patch_and_to_no_image() -> None:
    maps = torch.zeros(1, 5, 5, dtype=torch.int64)
    maps[0, 4, :] = 1
    maps[0, :, 4] = 1
    labels = reduce_labels(maps, 2, 2)
    assert labels.patch.shape == (1, 4, 2)
    assert not labels.patch[..., 1].any()
    assert not labels.image[0, 1]


def test_majority_counts_pixels_and_prefers_the_smaller_code_on_a_tie() -> None:
    maps = torch.tensor([[[0, 0, 5, 1], [0, 2, 1, 5]]])
    assert patch_majority(maps, 2, 6).tolist() == [[0, 1]]


@pytest.mark.parametrize("codes", [4, 30, 1000])
def test_equal_to_the_definition_with_many_codes_in_a_patch(codes: int) -> None:
    """Up to sixteen codes in a patch, and codes that need more than a byte."""
    maps = torch.randint(0, codes, (5, 12, 12), generator=torch.Generator().manual_seed(1))
    labels = reduce_labels(maps, 4, codes)
    union, image, majority = slow_labels(maps, (4, 4), codes)
    assert torch.equal(labels.patch, union)
    assert torch.equal(labels.image, image)
    assert torch.equal(labels.majority, majority)


def test_maps_of_bytes_give_the_same_labels_and_stay_as_they_are() -> None:
    maps = torch.randint(0, 6, (2, 9, 9), generator=torch.Generator().manual_seed(2))
    small = maps.to(torch.uint8)
    both = [reduce_labels(m, 4, 6) for m in (maps, small)]
    assert all(torch.equal(getattr(both[0], f), getattr(both[1], f)) for f in ("patch", "image", "majority"))
    assert torch.equal(small, maps)


def test_codes_may_stand_for_several_classes() -> None:
    # codes: ground, red circle, blue circle; classes: ground, circle, red, blue
    table = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]).bool()
    maps = torch.tensor([[[0, 1, 1, 2], [0, 0, 1, 2]], [[0, 0, 2, 2], [0, 0, 2, 2]]])
    union = patch_union(maps, 2, 4, table)
    assert union[0].int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 1]]
    assert union[1].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 1]]
    labels = reduce_labels(maps, 2, 4, table)
    assert labels.image.int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 1]]
    assert (labels.codes, labels.classes) == (3, 4)


@pytest.mark.parametrize("bad", [-1, 4])
def test_codes_outside_the_table_are_refused(bad: int) -> None:
    with pytest.raises(ValueError, match=r"outside 0\.\.3"):
        patch_union(torch.full((1, 4, 4), bad), 2, 4)


def test_maps_without_a_whole_patch_are_refused() -> None:
    with pytest.raises(ValueError, match="no patch"):
        patch_union(torch.zeros(1, 3, 8, dtype=torch.int64), 4, 2)


@pytest.mark.slow
@needs_goldens
def test_much_faster_than_a_loop_over_patches() -> None:
    """In processor time, for other work may run beside the test."""
    view = EvalTransform(384, mode="square")
    files = sorted(MASKS.iterdir())[:16]
    maps = torch.stack([view.labels(np.asarray(Image.open(f))).to(torch.uint8) for f in files])

    def seconds(function: Callable[[], object]) -> float:
        begin = time.process_time()
        function()
        return time.process_time() - begin

    fast = min(seconds(lambda: reduce_labels(maps, 14, 201)) for _ in range(20))
    assert seconds(lambda: slow_labels(maps[:4], (14, 14), 201)) * 4 > 50 * fast
