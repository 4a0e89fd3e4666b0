"""`localign verify-reference`: recompute every quantity in a reference folder and report the largest errors."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from rich.table import Table
from timm.data.transforms_factory import create_transform
from torch import Tensor

from localign import rng
from localign.alignment.export import export_student, load_student
from localign.alignment.losses import reconstruction_loss
from localign.alignment.masks import MaskSampler
from localign.alignment.published import PUBLISHED_SOFT_CAP, read_published
from localign.alignment.student import Student
from localign.alignment.teacher import Teacher, mask_images
from localign.backbones import Backbone
from localign.backbones.building import build_vit
from localign.backbones.weights import read_file
from localign.data.transforms import TrainTransform
from localign.errors import UserError
from localign.options.export import VerifyConfig
from localign.options.names import LossName
from localign.text.printing import console
from localign.text.reading import read_json_object
from localign.weights import load_strict

_ARCHITECTURE = "vit_base_patch16_224"
SAMPLERS_FILE = "samplers.json"
RATE_TOLERANCE = 0.025
"""Of each of the two sets of 4,000 masks, the rate in a small ring has an error of about 0.01."""
_CROP_SIZE, _CROPS = 32, 200


@dataclass(frozen=True)
class RecomputedQuantity:
    """One recomputed quantity."""

    variant: str
    quantity: str
    max_error: float
    """Largest absolute difference, divided by ``max(1, root mean square of the reference)``.

    Float32 rounding errors grow with the summands, not with the result, so small entries of a tensor carry errors as
    large as in its large entries. Builds of torch differ by that much (another tanh, another order of
    summation). The error is therefore relative to the whole tensor; for tensors of small entries it is absolute."""
    max_absolute: float
    """Largest absolute difference."""
    tolerance: float | None = None
    """Replaces the general tolerance, for rates of random draws."""


def verify_reference(folder: str | Path) -> list[RecomputedQuantity]:
    """Compare recomputed quantities with a folder of reference numbers, in float32 on the CPU.

    Args:
        folder: Holds ``meta.json`` and, for each variant, ``<variant>.safetensors`` and ``<variant>.pth.tar``; or
            ``samplers.json`` with rates of block masks; or both, and variants may lie in its folder ``maskembed``.

    Raises:
        UserError: The folder has neither file, or a variant holds an unknown quantity.
    """
    folder = Path(folder)
    samplers = folder / SAMPLERS_FILE
    results = [*_samplers(samplers), *_crop()] if samplers.is_file() else []
    if not (folder / "meta.json").is_file() and (folder / "maskembed" / "meta.json").is_file():
        folder = folder / "maskembed"
    meta_file = folder / "meta.json"
    if not meta_file.is_file():
        if results:
            return results
        raise UserError(f"{folder} is not a reference folder: it has no meta.json and no {SAMPLERS_FILE}")
    meta = read_json_object(meta_file)
    with torch.no_grad():
        for variant, facts in meta.items():
            reference = read_file(folder / f"{variant}.safetensors")
            backbone = _reference_backbone(variant, facts["vit"], reference)
            computed = [*_plain(backbone, reference), *_student(backbone, reference, folder, variant)]
            unchecked = {k for k in reference if not k.startswith(("backbone.", "images", "keep_masks"))}
            for name, value in computed:
                results.append(
                    RecomputedQuantity(variant, name, *_errors(value, reference[name.split(" ")[0]]))
                )
                unchecked.discard(name.split(" ")[0])
            if unchecked:
                raise UserError(f"{variant} holds unknown quantities: {', '.join(sorted(unchecked))}")
    return results


def _samplers(file: Path) -> Iterator[RecomputedQuantity]:
    """Rates of visibility of block masks, by ring of the grid (ring 0 is its border), beside published ones."""
    for name, published in read_json_object(file).items():
        if not isinstance(published, dict):
            continue  # a description
        rows, columns = published["grid"]
        sampler = MaskSampler("block", float(name.split()[-1]), complement=False, all_visible=False)
        masks = sampler(0, torch.arange(published["masks"]), (rows, columns))[:, 0].float()
        ring = _rings(rows, columns)
        expected = published["visible_rate_by_row_and_column_ring"]
        ours = [float(masks[:, ring == number].mean()) for number in range(len(expected))]
        ring_error = max(abs(a - b) for a, b in zip(ours, expected, strict=True))
        mean_error = abs(float(masks.mean()) - published["visible_share_mean"])
        yield RecomputedQuantity(name, "masks.rate_by_ring", ring_error, ring_error, RATE_TOLERANCE)
        yield RecomputedQuantity(name, "masks.visible_share", mean_error, mean_error, RATE_TOLERANCE)


def _rings(rows: int, columns: int) -> Tensor:
    """The distance of each patch from the border, ``(rows * columns,)``."""
    from_side = [torch.minimum(torch.arange(n), n - 1 - torch.arange(n)) for n in (rows, columns)]
    return torch.minimum(from_side[0][:, None], from_side[1][None]).flatten()


def _crop() -> Iterator[RecomputedQuantity]:
    """The published training crop beside timm's transform with the options of the published runs, in levels of 255."""
    reference = create_transform(
        _CROP_SIZE, is_training=True, train_crop_mode="rkrc", scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3),
        interpolation="random", color_jitter=0.0, use_prefetcher=True,
    )  # fmt: skip
    rows, columns = torch.meshgrid(torch.arange(90), torch.arange(140), indexing="ij")
    picture = Image.fromarray(torch.stack([rows * 2, columns, (rows * columns) % 256], -1).byte().numpy())
    crop, largest = TrainTransform(_CROP_SIZE, "published"), 0.0
    for position in range(_CROPS):
        with rng.seeded_globals(0, "transform", position):
            expected = torch.as_tensor(reference(picture))
        ours = crop(picture, 0, position)
        largest = max(largest, float((ours.double() - expected.double()).abs().max()))
    yield RecomputedQuantity("training crop", "crop.pixels", largest, largest)


def _errors(value: Tensor, reference: Tensor) -> tuple[float, float]:
    if value.shape != reference.shape:
        return float("inf"), float("inf")
    largest = float((value.double() - reference.double()).abs().max())
    if largest != largest:  # NaN would pass every comparison with a tolerance
        return float("inf"), float("inf")
    rms = float(reference.double().square().mean().sqrt())
    return largest / max(1.0, rms), largest


def _reference_backbone(
    variant: str, vit_kwargs: dict[str, object], reference: dict[str, Tensor]
) -> Backbone:
    vit = build_vit(_ARCHITECTURE, vit_kwargs, pretrained=False)
    weights = {k.removeprefix("backbone."): v for k, v in reference.items() if k.startswith("backbone.")}
    load_strict(vit, weights, variant)
    return Backbone(vit, name=variant, architecture=_ARCHITECTURE, model_kwargs=dict(vit_kwargs)).eval()


def _plain(backbone: Backbone, reference: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    images, keep = reference["images"], _keep_masks(reference)
    yield "tokens.plain", backbone.tokens(images)
    for cap in (30, 1):
        yield f"tokens.softcap{cap}", backbone.copy(soft_cap=float(cap)).tokens(images)
    yield "teacher.skip0", Teacher(backbone, "last")(images, keep)
    yield "teacher.skip1", Teacher(backbone, "penultimate")(images, keep)
    views = mask_images(images, keep, backbone.grid, backbone.patch_size)
    yield "teacher.skip2", backbone.tokens(views, layer=-3)
    if "teacher.cls" in reference:
        yield "teacher.cls", Teacher(backbone, "cls")(images, keep)


def _keep_masks(reference: dict[str, Tensor]) -> Tensor:
    images = reference["images"].shape[0]
    return reference["keep_masks"].bool().view(images, -1, reference["keep_masks"].shape[-1])


def _student(
    backbone: Backbone, reference: dict[str, Tensor], folder: Path, variant: str
) -> Iterator[tuple[str, Tensor]]:
    """Quantities of the student from the published file, and again after a round trip through our export."""
    student = read_published(folder / f"{variant}.pth.tar", backbone, soft_cap=PUBLISHED_SOFT_CAP)
    yield from _student_quantities(student, backbone, reference, "")
    with tempfile.TemporaryDirectory() as temporary:
        export_student(student, temporary)
        yield from _student_quantities(load_student(temporary), backbone, reference, " (exported)")


def _student_quantities(
    student: Student, backbone: Backbone, reference: dict[str, Tensor], note: str
) -> Iterator[tuple[str, Tensor]]:
    images, keep = reference["images"], _keep_masks(reference)
    yield f"student.encoder{note}", student.encoder(images)
    # The decoder amplifies rounding errors of the encoder, so the decoder is also checked alone.
    yield f"student.reconstruction (decoder alone){note}", student.decode(reference["student.encoder"], keep)
    reconstruction = student(images, keep)
    yield f"student.reconstruction{note}", reconstruction
    target = Teacher(backbone, "penultimate")(images, keep)
    names: tuple[LossName, LossName] = ("mse", "cosine")
    for name in names:
        total, count = reconstruction_loss(reconstruction, target, name)
        yield f"student.{name}{note}", (total / count).reshape(reference[f"student.{name}"].shape)


def run_verify_reference(config: VerifyConfig) -> int:
    """Print the error of every quantity, and the largest error as JSON.

    Returns:
        The exit code: 1 if an error exceeds the tolerance, else 0.

    Raises:
        UserError: See :func:`verify_reference`.
    """
    table = Table(caption="error: largest difference divided by max(1, root mean square of the reference)")
    for column in ("variant", "quantity", "error", "absolute"):
        table.add_column(column)
    results = verify_reference(config.folder)
    for row in results:
        style = None if row.max_error <= _tolerance(row, config) else "bold red"
        table.add_row(
            row.variant, row.quantity, f"{row.max_error:.1e}", f"{row.max_absolute:.1e}", style=style
        )
    console().print(table)
    worst = max(results, key=lambda r: r.max_error / _tolerance(r, config))
    summary = {"quantities": len(results), "largest_error": worst.max_error, "of": worst.quantity}
    print(json.dumps({**summary, "tol": config.tol}))
    return 0 if worst.max_error <= _tolerance(worst, config) else 1


def _tolerance(row: RecomputedQuantity, config: VerifyConfig) -> float:
    return config.tol if row.tolerance is None else row.tolerance
