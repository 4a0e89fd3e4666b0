"""The demo of vision-language models at the smallest size, and export, check and chat on its results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from localign.cli import main
from localign.options.vlm.demo import MODELS, VLMDemoConfig
from localign.vlm.demo.run import EVALUATION, run_vlm_demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "vlm-demo"
    run_vlm_demo(config(out, models=("baseline-mlp",)))
    return out


def config(out: Path, **changes: object) -> VLMDemoConfig:
    options = {"scenes": 30, "test_scenes": 6, "questions": 3, "llm_steps": 3, "steps": 3, "batch_size": 4}
    return VLMDemoConfig(out=str(out), device="cpu", **{**options, **changes})  # type: ignore[arg-type]


def test_training_options_of_the_models(tmp_path: Path) -> None:
    ours, plain = config(tmp_path), config(tmp_path, optimizer="adamw")
    assert (ours.vlm_config("baseline-mlp", 0).optimizer, plain.vlm_config("baseline-mlp", 0).optimizer) == (
        "muon",
        "adamw",
    )
    assert ours.vlm_config("aligned-decoder", 0).adapter_lr is None
    slow = config(tmp_path, adapter_lr=1e-5)
    rates = {name: slow.vlm_config(name, 0).adapter_lr for name in MODELS}
    assert {name for name, rate in rates.items() if rate == 1e-5} == {
        "aligned-decoder", "baseline-truncated", "aligned-truncated"
    }  # fmt: skip


def test_every_kind_of_question_is_asked_and_scored(demo: Path) -> None:
    results = json.loads((demo / "results.json").read_text())
    (seed,) = results["models"]["baseline-mlp"]
    assert set(seed["kinds"]) == set(results["guessing"]) == set(results["config"]["kinds"])
    evaluation = demo / "baseline-mlp-seed0" / EVALUATION
    answers = (evaluation / "answers.jsonl").read_text().splitlines()
    figures = json.loads((evaluation / "results.json").read_text())["benchmarks"]["scenes"]["figures"]
    assert sum(kind["questions"] for kind in seed["kinds"].values()) == len(answers)
    for kind, summary in seed["kinds"].items():
        low, high = summary["interval"]
        assert 0 <= low <= summary["accuracy"] <= high <= 1, kind
        assert 100 * summary["accuracy"] == pytest.approx(figures[f"accuracy__Scenes-{kind}"]["value"])


def test_vlm_eval_gives_the_demos_results(demo: Path, tmp_path: Path) -> None:
    run = demo / "baseline-mlp-seed0"
    options = [
        "--benchmarks",
        "scenes",
        "--data",
        str(demo / "test"),
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    assert main(["vlm", "eval", str(run), *options]) == 0
    one, other = (
        json.loads((folder / "results.json").read_text())["benchmarks"]
        for folder in (run / EVALUATION, tmp_path)
    )
    assert one == other


@pytest.mark.slow
def test_a_demo_resumes_with_more_models_and_seeds(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (demo / "baseline-mlp-seed0" / "export" / "model.safetensors").stat().st_mtime_ns
    models = ("baseline-mlp", "baseline-truncated")
    results = run_vlm_demo(config(demo, models=models, seeds=2))
    assert (demo / "baseline-mlp-seed0" / "export" / "model.safetensors").stat().st_mtime_ns == before
    assert {name: len(seeds) for name, seeds in results["models"].items()} == dict.fromkeys(models, 2)
    assert "±" in capsys.readouterr().out
    first, second = (
        load_file(demo / f"baseline-mlp-seed{s}" / "export" / "model.safetensors") for s in (0, 1)
    )
    assert any(not first[name].equal(second[name]) for name in first if name.startswith("model.adapter."))


def test_other_settings_are_refused(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vlm", "demo", "--out", str(demo), "--steps", "7"]) == 2
    assert "another config" in capsys.readouterr().err
    assert main(["vlm", "demo", "--models", "aligned"]) == 2
    assert "unknown model 'aligned'" in capsys.readouterr().err


def test_export_check_and_chat(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = demo / "baseline-mlp-seed0"
    assert main(["vlm", "export", str(run), "--out", str(tmp_path / "model")]) == 0
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert {str(t.dtype) for t in tensors.values()} == {"torch.bfloat16"}
    image = next((demo / "test" / "images").glob("*.png"))
    question = ["--question", "What is it?", "--max-new-tokens", "4"]
    assert main(["vlm", "chat", str(tmp_path / "model"), str(image), *question]) == 0
    assert main(["vlm", "chat", str(run), str(tmp_path / "none.png"), *question]) == 2
    assert "cannot read the image" in capsys.readouterr().err
    data = str(demo / "train" / "questions.json")
    assert main(["vlm", "check", data, "--llm", str(demo / "llm" / "export"), "--image-tokens", "36"]) == 0
    out = capsys.readouterr().out
    assert "30, 0 of them text only" in out
    assert "ready      yes" in out
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps([{"id": 1, "image": "gone.png", "conversations": []}]))
    assert main(["vlm", "check", str(broken)]) == 2
    assert "malformed  1" in capsys.readouterr().out


def test_boxes_are_drawn_onto_a_copy(tmp_path: Path) -> None:
    from localign.vlm.chat import draw_boxes
    from localign.vlm.scoring.boxes import Box, Size

    image = Image.new("RGB", (40, 20))
    drawn = draw_boxes(image, [Box.of_pixels((10, 5, 30, 15), Size(40, 20))])
    assert image.getpixel((10, 10)) == (0, 0, 0)
    assert drawn.getpixel((10, 10)) != (0, 0, 0)
    assert drawn.getpixel((20, 10)) == (0, 0, 0)
