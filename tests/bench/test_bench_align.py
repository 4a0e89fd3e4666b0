"""`localign bench align`: both implementations compute the same loss, and speeds are compared only if losses agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from localign.alignment import AlignConfig, AlignTask
from localign.bench import align as bench
from localign.bench.align import align_tables
from localign.bench.align_ways import PlainImages, plain_loss, plain_student
from localign.bench.ceiling import Ceiling
from localign.cli import main
from localign.engine.task import BatchPlan
from localign.planning.counting import CountedAlignment

SMALL = {"depth": 3, "embed_dim": 48, "num_heads": 3}
TINY = "--image-size 32 --batch-size 2 --steps 2 --device cpu"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    draws = torch.Generator().manual_seed(0)
    for number in range(4):
        pixels = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8, generator=draws)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return folder


def config(images: Path, **values: Any) -> AlignConfig:
    given: dict[str, Any] = {"backbone": "vit_tiny_patch16_224", "image_size": 48, "model_kwargs": SMALL}
    return AlignConfig(
        **given, weights="none", data=str(images), batch_size=3, steps=4, workers=0, device="cpu", **values
    )


@pytest.mark.parametrize("soft_cap", ["auto", None])
def test_the_plain_implementation_computes_the_same_loss_and_gradients(
    images: Path, soft_cap: str | None
) -> None:
    options = config(images, soft_cap=soft_cap, decoder_layer_scale=0.5)
    task = AlignTask(options)
    task.to(torch.device("cpu"))
    plain = AlignTask(options)
    student, teacher = plain_student(options, plain.teacher.backbone), plain.teacher.backbone
    for model in (task.student, student):
        draws = torch.Generator().manual_seed(1)
        model.encoder.head.weight.data = torch.randn(48, 48, generator=draws) / 7
    batch = next(task.batches(BatchPlan(options.seed, 3, 3, 0, 1, 0, 0, 4, False)))
    positions = list(batch.positions.tolist())
    loaded = torch.stack([PlainImages(options, teacher)[p] for p in positions])
    normalised, masks = task.views(batch)
    assert torch.allclose(loaded, normalised, atol=1e-5)
    loss, scale = plain_loss(student, teacher, loaded, masks, scale=None)
    task.teacher.scale.fill_(float(scale))
    ours = task.step(task.student, batch)
    assert float(ours.loss_sum.detach() / ours.weight) == pytest.approx(float(loss.detach()), rel=1e-5)
    (ours.loss_sum / ours.weight).backward()
    loss.backward()
    gradients = [
        {n.replace("given.", ""): p.grad for n, p in m.named_parameters()} for m in (task.student, student)
    ]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert gradient is not None
        assert other is not None
        assert torch.allclose(gradient, other, atol=1e-4 * float(gradient.abs().max()) + 1e-9), name


def test_flops_are_what_torch_counts(images: Path) -> None:
    task = AlignTask(config(images))
    task.to(torch.device("cpu"))
    batch = next(task.batches(BatchPlan(0, 3, 3, 0, 1, 0, 0, 4, False)))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        task.step(task.student, batch).loss_sum.backward()
    assert 3 * CountedAlignment(task.config).flops().total == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )


@pytest.mark.slow
def test_the_command_measures_both_ways(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], images: Path
) -> None:
    out = tmp_path / "b.json"
    assert main(["bench", "align", *TINY.split(), "--data", str(images), "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["precision"] == "fp32"
    (part,) = content["parts"]
    assert part["agree"]
    assert [row["way"] for row in part["ways"]] == ["ours", "plain"]
    ours, plain = part["ways"]
    assert plain["times_faster"] == plain["times_faster_without_loading"] == {"wall": 1, "cpu": 1}
    assert ours["times_faster"]["wall"] == pytest.approx(plain["seconds"]["wall"] / ours["seconds"]["wall"])
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    for row in (ours, plain):
        assert row["images_per_second"]["wall"] * row["seconds"]["wall"] == pytest.approx(2)
        assert len(row["seconds_of_steps"]) == 2
        assert 0 < row["data_wait"] < 1
        assert row["flops"] == ours["flops"]
        assert row["mfu"] == pytest.approx(row["flops_per_second"] / content["ceiling_flops"])
        assert row["peak_bytes"] > 1 << 20
    assert "the same images" in " ".join(capsys.readouterr().out.split())


class Measured:
    """Replaces a process that has taken its steps."""

    out_of_memory = False

    def __init__(self, name: str, loss: float, options: AlignConfig, wall: float = 2.0) -> None:
        self.name, self.config = name, options
        self.steps = [{"wall": wall, "cpu": 1.0, "data_wait": 0.5, "loss": loss, "peak_bytes": 1 << 30}]


def shown(losses: tuple[float, float], options: AlignConfig) -> tuple[dict[str, Any], list[str]]:
    ways = [Measured("ours", losses[0], options, wall=1.0), Measured("plain", losses[1], options)]
    part = bench._summarise("the same images", ways, 2e9)  # type: ignore[arg-type]
    rows = [row | {"mfu": 0.5, "flops_per_second": 1e9} for row in part["ways"]]
    hardware = {"device": "cpu", "processor": "x", "threads": 1}
    content = {"backbone": "b", "precision": "fp32", "size": 32, "hardware": hardware, "ceiling_flops": 2e9}
    (table,) = align_tables({**content, "parts": [{**part, "ways": rows}]})
    return part, [str(column.header) for column in table.columns]


def test_implementations_with_different_losses_are_not_compared(images: Path) -> None:
    part, columns = shown((1.0, 1.001), config(images))
    assert part["ways"][0]["times_faster"]["wall"] == 2
    assert part["ways"][0]["times_faster_without_loading"]["wall"] == 3
    assert "times faster" in columns
    for losses in ((1.0, 1.1), (float("nan"), 1.0)):
        part, columns = shown(losses, config(images))
        assert not part["agree"]
        assert not any("times_faster" in row for row in part["ways"])
        assert not any("faster" in column for column in columns)


def test_a_ceiling_is_the_fastest_product() -> None:
    ceiling = Ceiling(torch.device("cpu"), torch.float32)
    ceiling.seconds = [2.0, 0.5, 1.0]
    assert ceiling.flops == 2 * 2048**3 / 0.5


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("bench align --repeats 2", "unknown option --repeats"),
        ("bench align --questions 2", "unknown option --questions"),
        ("bench align --steps 0", "--steps must be above 0"),
        ("bench align --backbone vit_tinny", "unknown backbone 'vit_tinny'"),
        ("bench align --data /nonexistent", "there is no folder /nonexistent"),
        ("bench align --largest-batch", "--largest-batch measures the memory of CUDA GPUs, not of cpu"),
    ],
)
def test_bad_use_is_one_line(command: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), *(["--device", "cpu"] if "align" in command else [])]) == 2
    assert said in capsys.readouterr().err
