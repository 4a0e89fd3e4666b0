"""Vision-language models at native resolution: the number of image tokens follows from each image's aspect ratio."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from native_models import MOST, SHAPES, naflex_backbone, native_vlm, pictures
from safetensors.torch import load_file
from test_vlm_ranks import finished
from tiny_vlm import tiny_backbone
from torch import Tensor
from vlm_data import record, write_json
from vlm_models import KINDS, picture, tiny_processor
from vlm_runs import STEPS, arguments, assert_close, forget_the_end, logged, trained, without_llm

from localign.backbones.building import set_image_size
from localign.backbones.native import NativeImages, native_grid
from localign.cli import main, parse
from localign.data.transforms import to_tensor
from localign.engine import BatchPlan
from localign.errors import UserError
from localign.vlm import LocalignVLM
from localign.vlm.data.batching import VLMBatch, longest_batch, planned_batches
from localign.vlm.data.examples import ConversationTokenizer
from localign.vlm.data.prompts import prompt_format
from localign.vlm.data.records import Conversations
from localign.vlm.model.build import load_vlm
from localign.vlm.model.configuration import LocalignVLMConfig
from localign.vlm.model.presets import VisionSource
from localign.vlm.model.vision import TowerConfig, VisionTower
from localign.vlm.task import VLMTask, batch_loss

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-5}


def features_of(model: LocalignVLM, tokenizer: Any, images: list[Any]) -> list[Tensor]:
    """The embeddings of each image, computed in one batch."""
    batch = tiny_processor(model, tokenizer)(text=["?"] * len(images), images=images)
    found = model.get_image_features(batch["pixel_values"], batch["image_grids"])
    prefix = model.vision.num_prefix_tokens
    return list(found.split((batch["image_grids"].prod(dim=1) + prefix).tolist()))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_images_of_several_shapes_have_the_embeddings_that_they_have_alone(kind: str) -> None:
    model, tokenizer = native_vlm(kind)
    together = features_of(model, tokenizer, pictures())
    assert len({len(found) for found in together}) > 2
    for image, found in zip(pictures(), together, strict=True):
        rows, columns = native_grid(image.height, image.width, (8, 8), MOST)
        assert found.shape == (model.vision.num_prefix_tokens + rows * columns, 32)
        torch.testing.assert_close(found, features_of(model, tokenizer, [image])[0], **CLOSE)


@pytest.mark.parametrize("kind", [*KINDS, "naflex"])
@torch.no_grad()
def test_square_images_give_the_logits_of_the_fixed_size(kind: str) -> None:
    options: dict[str, Any] = {"kind": kind}
    if kind == "naflex":
        options = {"kind": "transformer", "sources": [VisionSource(naflex_backbone())]}
    native, tokenizer = native_vlm(**options, max_patches=4)
    fixed, _ = native_vlm(**options, max_patches=None)
    texts, images = ["What is it?", "How many are there?"], [picture(1, (16, 16)), picture(2, (40, 40))]
    ours, theirs = (tiny_processor(m, tokenizer)(text=texts, images=images) for m in (native, fixed))
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert ours["image_grids"].tolist() == [[2, 2], [2, 2]]
    torch.testing.assert_close(native(**ours).logits, fixed(**theirs).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_positions_are_resampled_as_the_backbone_does_it() -> None:
    """Bilinear for NaFlex, on the grid of the image: the tower's tokens are those at that size."""
    model, tokenizer = native_vlm("linear", [VisionSource(naflex_backbone())])
    assert model.vision.configs[0].position_interpolation == "bilinear"
    again = LocalignVLM(cast(LocalignVLMConfig, model.config)).vision
    assert again.backbones[0].position_interpolation == "bilinear"
    image = picture(1, (24, 16))
    batch = tiny_processor(model, tokenizer)(text="?", images=image)
    assert batch["image_grids"].tolist() == [[2, 3]]
    found = model.vision(NativeImages.of(batch["pixel_values"], batch["image_grids"]))
    own = set_image_size(naflex_backbone(), (16, 24))
    expected = own.tokens(own.normalise(to_tensor(image)[None]), layer=-2, norm=False)
    torch.testing.assert_close(found, expected, **CLOSE)


# -- batches --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Conversations:
    folder = tmp_path_factory.mktemp("shapes")
    entries = []
    for number in range(24):
        image = None if number % 6 == 5 else f"{number}.png"
        entries.append(record(number, image=image, turns=1 + number % 2, words=1 + number * 5 % 7))
        if image:
            picture(number, SHAPES[number % len(SHAPES)]).save(folder / image)
    return Conversations.open([write_json(folder / "data.json", entries)])


def encoder_of(model: LocalignVLM, tokenizer: Any, **options: Any) -> ConversationTokenizer:
    return ConversationTokenizer(prompt_format("in-out"), tokenizer, model.num_image_tokens, 400, **options)


def batches(
    data: Conversations, model: LocalignVLM, tokenizer: Any, *, packed: bool = True, **plan: Any
) -> list[VLMBatch]:
    sizes: dict[str, Any] = {"global_batch": 8, "micro_batch": 8, "rank": 0, "world_size": 1, "workers": 0}
    sizes |= {"start_step": 0, "end_step": 3, "pin_memory": False, **plan}
    transform = tiny_processor(model, tokenizer).image_transform()
    encoder = encoder_of(model, tokenizer)
    return list(planned_batches(data, encoder, transform, BatchPlan(seed=7, **sizes), packed=packed))


def test_the_image_tokens_of_a_record_follow_from_its_image(records: Conversations) -> None:
    model, tokenizer = native_vlm("transformer")
    for batch in batches(records, model, tokenizer):
        assert batch.cu_seqlens is not None
        grids = iter(batch.grids)
        spans = pairwise(batch.cu_seqlens.tolist())
        for index, (begin, end) in zip(batch.indices.tolist(), spans, strict=True):
            found = int((batch.input_ids[0, begin:end] == model.config.image_token_id).sum())
            image = records.record(index).image
            if image is None:
                assert found == 0
                continue
            width, height = SHAPES[index % len(SHAPES)]
            rows, columns = native_grid(height, width, (8, 8), MOST)
            assert tuple(next(grids)) == (rows, columns)
            assert found == 1 + rows * columns
        assert next(grids, None) is None
        assert batch.images.shape[1:] == (max(r * c for r, c in batch.grids), 192)


def gradients(model: LocalignVLM, batches: list[VLMBatch]) -> tuple[Tensor, int, dict[str, Tensor]]:
    model.zero_grad()
    results = [batch_loss(model, batch, "chunked") for batch in batches]
    count = sum(int(result.weight) for result in results)
    loss = torch.stack([result.loss_sum for result in results]).sum() / count
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), count, found


@pytest.mark.parametrize("kind", ["mlp", "decoder", "truncated"])
def test_packed_and_padded_rows_give_the_loss_and_gradients_of_records_one_by_one(
    records: Conversations, kind: str
) -> None:
    model, tokenizer = native_vlm(kind)
    model.train()
    model.vision.set_trainable(True)
    alone = gradients(model, batches(records, model, tokenizer, micro_batch=1, end_step=1))
    assert alone[2]["vision.towers.0.vit.pos_embed"].abs().max() > 1e-5
    for packed in (True, False):
        for micro in (8, 4):
            split = batches(records, model, tokenizer, packed=packed, micro_batch=micro, end_step=1)
            found = gradients(model, split)
            assert found[1] == alone[1]
            torch.testing.assert_close(found[0], alone[0], **CLOSE)
            for name, expected in alone[2].items():
                torch.testing.assert_close(found[2][name], expected, atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("packed", [True, False])
def test_a_resumed_stream_is_the_rest_of_the_whole_one(records: Conversations, packed: bool) -> None:
    model, tokenizer = native_vlm()
    whole, rest, helped = (
        batches(records, model, tokenizer, packed=packed, micro_batch=4, end_step=5, **more)
        for more in ({}, {"start_step": 2}, {"start_step": 2, "workers": 2})
    )
    for first, second in ((whole[4:], rest), (whole[4:], helped)):
        assert len(first) == len(second) == 6
        for one, other in zip(first, second, strict=True):
            for name, value in one._asdict().items():
                if isinstance(value, Tensor):
                    assert torch.equal(value, getattr(other, name)), name
            assert [tuple(g) for g in one.grids] == [tuple(g) for g in other.grids]


def test_ranks_and_micro_batches_have_similar_numbers_of_tokens(records: Conversations) -> None:
    model, tokenizer = native_vlm()
    steps = [
        batches(records, model, tokenizer, micro_batch=4, rank=rank, world_size=2, global_batch=24, end_step=1)
        for rank in range(2)
    ]  # fmt: skip
    lengths = [batch.input_ids.shape[1] for rank in steps for batch in rank]
    assert len(lengths) == 6
    assert max(lengths) < 1.15 * sum(lengths) / len(lengths)


@pytest.mark.parametrize("packed", [True, False])
def test_the_worst_batch_has_the_most_patches_and_padding(records: Conversations, packed: bool) -> None:
    model, tokenizer = native_vlm()
    transform, encoder = tiny_processor(model, tokenizer).image_transform(), encoder_of(model, tokenizer)
    for samples in (1, 3, 40):
        batch = longest_batch(records, encoder, transform, samples, packed=packed)
        assert len(batch.positions) == samples
        assert set(batch.grids) == {(1, MOST)}
        assert batch.images.shape[1] == MOST + 1
        batch_loss(model, batch, "chunked")
    every = batches(records, model, tokenizer, micro_batch=1, packed=packed)
    worst = longest_batch(records, encoder, transform, 1, packed=packed).input_ids.shape[1]
    assert worst >= 0.9 * max(batch.input_ids.shape[1] for batch in every)


def test_the_limit_leaves_room_for_the_largest_image() -> None:
    model, tokenizer = native_vlm()
    with pytest.raises(UserError, match=f"an image takes {MOST}; allow at least {MOST + 4}"):
        ConversationTokenizer(prompt_format("in-out"), tokenizer, model.num_image_tokens, MOST + 3)


@torch.no_grad()
def test_inputs_that_do_not_fit_are_errors() -> None:
    model, tokenizer = native_vlm()
    batch = tiny_processor(model, tokenizer)(text=["?"], images=[picture(1)])
    pixels, grids = batch["pixel_values"], batch["image_grids"]
    with pytest.raises(ValueError, match="1 images need 6 image tokens, but the text has 5"):
        model(input_ids=batch["input_ids"][:, 2:], pixel_values=pixels, image_grids=grids)
    with pytest.raises(ValueError, match="image_grids go with models of native resolution"):
        model(input_ids=batch["input_ids"], pixel_values=pixels)
    for wrong in (pixels.float(), pixels[:, :-1], pixels[..., :-1], pixels[:0]):
        with pytest.raises(ValueError, match=r"pixel_values must be uint8|image tokens"):
            model(input_ids=batch["input_ids"], pixel_values=wrong, image_grids=grids)


# -- runs -----------------------------------------------------------------------------------------------------


NATIVE = ("--max-patches", "12")


@pytest.fixture(scope="module")
def native(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on one rank, packed, in one micro-batch."""
    out = tmp_path_factory.mktemp("native") / "run"
    torch.set_num_threads(1)
    trained(data, out, *NATIVE)
    return out


@pytest.mark.parametrize(
    "more",
    [["--micro-batch", "2"], ["--batching", "padded", "--workers", "1"], ["--micro-batch", "auto"]],
    ids=" ".join,
)
def test_how_a_step_is_computed_changes_nothing(
    data: Path, native: Path, tmp_path: Path, more: list[str]
) -> None:
    weights = trained(data, tmp_path / "run", *NATIVE, *more)
    assert_close(weights, load_file(native / "export" / "model.safetensors"))
    assert logged(tmp_path / "run", "samples") == logged(native, "samples")
    for field in ("loss", "val_loss", "grad_norm"):
        assert logged(tmp_path / "run", field) == pytest.approx(logged(native, field), abs=1e-5)
    assert set(logged(native, "image_text_ratio")) == set(range(1, STEPS + 1))


def test_a_resumed_run_equals_the_uninterrupted_run(data: Path, native: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = [*NATIVE, "--checkpoint-every", "2", "--keep-checkpoints", "9"]
    assert main(arguments(data, out, *more)) == 0
    forget_the_end(out, (5, 6))  # as if it had been killed after step 4
    assert main(arguments(data, out, *more, "--resume")) == 0
    ours, theirs = (load_file(f / "export" / "model.safetensors") for f in (out, native))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert logged(out, "samples") == logged(native, "samples")


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--sharding", "full", "--micro-batch", "1"]], ids=" ".join)
def test_two_ranks_equal_one(data: Path, native: Path, tmp_path: Path, more: list[str]) -> None:
    finished(2, arguments(data, tmp_path / "run", *NATIVE, *more))
    ours, theirs = (load_file(f / "export" / "model.safetensors") for f in (tmp_path / "run", native))
    assert_close(ours, theirs)
    assert logged(tmp_path / "run", "samples") == logged(native, "samples")
    assert logged(tmp_path / "run", "loss") == pytest.approx(logged(native, "loss"), abs=1e-5)


def test_a_second_stage_keeps_the_budget_or_takes_another(data: Path, native: Path, tmp_path: Path) -> None:
    for more, most in (((), 12), (("--max-patches", "8"), 8)):
        command = without_llm(arguments(data, tmp_path / "run", "--init", str(native), *more))
        task = VLMTask(parse("vlm train", command[2:]))
        assert task.model.config.max_patches == most
        assert task.encoder.num_image_tokens == most
    model, _ = load_vlm(native)
    assert model.config.max_patches == 12


def test_a_model_of_one_size_becomes_one_of_several(data: Path, whole: Path, tmp_path: Path) -> None:
    command = without_llm(arguments(data, tmp_path / "run", "--init", str(whole), *NATIVE, "--steps", "2"))
    assert main(command) == 0
    assert json.loads((tmp_path / "run" / "export" / "config.json").read_text())["max_patches"] == 12
    assert json.loads((whole / "export" / "config.json").read_text())["max_patches"] is None


def test_a_plan_counts_the_budget(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = ["--backbone", "vit_tiny_patch16_224", "--weights", "none"]
    assert main(arguments(data, tmp_path / "run", *NATIVE, *backbone, "--dry-run")) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("image")]
    assert line.split()[1:] == ["12", "tokens"]


EVA = ["--backbone", "eva02_tiny_patch14_224", "--weights", "none", "--image-size", "28"]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--max-patches", "3"], "--max-patches must be at least 4, not 3"),
        ([*NATIVE, "--resize", "letterbox"], "--resize letterbox does not apply to images of several sizes"),
        ([*NATIVE, "--max-length", "15"], "leaves no room for text: an image takes 12; allow at least 16"),
        ([*NATIVE, *EVA], "images of several sizes need a ViT with a position embedding"),
        ([*NATIVE, *EVA, "--dry-run"], "images of several sizes need a ViT with a position embedding"),
    ],
)
def test_bad_options_are_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], line: str
) -> None:
    assert main(arguments(data, tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert line in error


def test_a_stock_llava_takes_one_size(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["vlm", "export", str(native), "--format", "llava", "--out", str(tmp_path / "llava")]
    assert main(command) == 2
    assert "the format llava takes images of one size" in capsys.readouterr().err
    assert not (tmp_path / "llava").exists()


def test_backbones_with_patches_of_other_sizes_are_not_fused() -> None:
    vits = [tiny_backbone("one"), tiny_backbone("other", image_size=20)]
    vits[1].vit.patch_embed.patch_size = (7, 7)
    vits[1].vit.patch_embed.img_size = (16, 16)
    tower = VisionTower([TowerConfig.of(v, layer=-2, norm=False, keep_prefix=False) for v in vits], vits)
    with pytest.raises(UserError, match=r"one \(patches of 8 pixels\) and other \(of 7\) cannot be fused"):
        tower.check_native()
