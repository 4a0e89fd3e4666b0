"""Make the files of ``tests/compat/v<version>``: run folders, checkpoints, exports and config files of one release.

    PYTHONPATH=<checkout>/src OMP_NUM_THREADS=1 python tests/compat/make_fixtures.py OUT

The script creates the folder OUT and runs the commands of the installed localign in it, so all paths in the files are
relative to OUT. ``v0.1.0`` was made with localign 0.1.0. The script takes some minutes, most of them for
``reproduce``. Never change the files of a released version; give a later release a folder of its own.

All models are tiny. SIGTERM stops each training run midway; a copy of its folder is then resumed to the end.
``expected.json`` and ``expected.safetensors`` hold the results of the resumed runs and of the exports.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import localign
from localign.cli import main
from localign.finetuning import load_classifier

STOP_AFTER = 5
"""A run gets SIGTERM when its log has this step; it stops one or a few steps later."""
QUESTION, PICTURE = "What is in the picture?", "photos/red/1.png"
LOOP = "--steps 14 --batch-size 4 --lr 1e-3 --eps 1e-5 --workers 0 --device cpu --log-every 1"
TINY = {"img_size": 24, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2}

ALIGN: dict[str, Any] = {
    "base": "maskembed", "backbone": "start", "data": "photos", "val": "photos/blue", "val_images": 4,
    "epochs": None, "steps": 14, "batch_size": 4, "lr": 1e-3, "eps": 1e-5, "precision": "fp32", "workers": 0,
    "scale_images": 6, "decoder_depth": 1, "decoder_layer_scale": 0.1, "max_bad_share": 0.2, "device": "cpu",
    "log_every": 1, "val_every": 4, "checkpoint_every": 4, "keep_checkpoints": 1,
    "warmup_share": 0.5, "warmup_start": 0.25, "ema": 0.9,
}  # fmt: skip
PLAN: dict[str, Any] = {
    "base": "maskembed", "backbone": "vit_tiny_patch16_224", "model_kwargs": TINY, "data": "imagenet-1k",
    "gpus": 4, "gpu": "A100", "warmup_share": 0.01, "warmup_start": 0.1, "ema": 0.999, "save": "plan.json",
}  # fmt: skip
VLM: dict[str, Any] = {
    "data": ["conversations.json"], "images": ["photos"], "llm": "llm", "backbone": ["align-finished"],
    "adapter": "decoder", "stage": "finetune", "steps": 14, "batch_size": 4, "max_length": 96, "lr": 1e-3,
    "adapter_lr": 5e-4, "eps": 1e-5, "warmup_share": 0.3, "warmup_start": 0.1, "workers": 0, "device": "cpu",
    "log_every": 1, "keep_checkpoints": 1,
}  # fmt: skip


# -- input files -----------------------------------------------------------------------------------------


def write_photos() -> None:
    """Twelve smooth PNG files in two class folders; one lacks its second half."""
    draw = np.random.default_rng(0)
    for number in range(12):
        path = Path("photos", "red" if number % 2 else "blue", f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(draw.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        small.resize((30, 26), Image.Resampling.BICUBIC).save(path)
    broken = Path("photos/blue/10.png")
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])


def write_conversations() -> None:
    """Records with and without images, of one or two turns."""
    records = []
    for number in range(10):
        record: dict[str, Any] = {"id": f"r{number}", "conversations": []}
        if number % 4:
            record["image"] = f"{'red' if number % 2 else 'blue'}/{number}.png"
        for turn in range(1 + number % 2):
            mark = "<image>\n" if not turn and number % 4 else ""
            record["conversations"] += [
                {"from": "human", "value": f"{mark}What is {number}{'?' * (number % 3)}"},
                {"from": "gpt", "value": f"It is {number + turn}."},
            ]
        records.append(record)
    Path("conversations.json").write_text(json.dumps(records, indent=1) + "\n")


def write_language_model() -> None:
    """A random Llama of one layer, and a tokenizer with one token per byte."""
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>"])}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    torch.manual_seed(0)
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocab), hidden_size=8, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512, bos_token_id=0,
            eos_token_id=1, pad_token_id=None, initializer_range=0.2,
        )
    )  # fmt: skip
    llm.save_pretrained("llm")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained("llm")


def write_recipes() -> None:
    """Config files with the option names of this release."""
    for name, values in {"align": ALIGN, "plan": PLAN, "vlm": VLM}.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


# -- commands -------------------------------------------------------------------------------------------


def run(command: str) -> str:
    """Run `localign COMMAND`, which must succeed, and return what it prints."""
    print(f"localign {command}", file=sys.stderr)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = main(shlex.split(command))
    if code:
        raise SystemExit(f"localign {command}: exit code {code}")
    return said.getvalue()


def run_in_two_parts(command: str, name: str) -> None:
    """Train into NAME-stopped until SIGTERM stops the run midway, and resume a copy of it as NAME-finished."""
    stopped, finished = Path(f"{name}-stopped"), Path(f"{name}-finished")
    watch = threading.Thread(target=_ask_to_stop, args=(stopped / "log.jsonl",), daemon=True)
    watch.start()
    run(f"{command} --out {stopped}")
    watch.join()
    assert list(stopped.glob("checkpoints/step-*")), "the run stopped before its first step"
    assert not (stopped / "results.json").exists(), "the run ended before it could be stopped"
    shutil.copytree(stopped, finished)
    run(f"{command} --out {finished} --resume")


def _ask_to_stop(log: Path) -> None:
    while not log.is_file() or f'"step": {STOP_AFTER},' not in log.read_text():
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)


def make_runs() -> None:
    """Training runs, exports and shards."""
    size = " ".join(f"{name}={value}" for name, value in TINY.items())
    run(f"export vit_tiny_patch16_224 --weights none --model-kwargs {size} --out start")
    run("data shard photos shards --shard-images 8 --workers 0 --seed 3")
    run_in_two_parts("align --config align.yaml", "align")
    run_in_two_parts(
        f"align {LOOP} --objective clipself --backbone start --data photos --scale-images 6 --train-blocks 1 "
        "--max-bad-share 0.2 --keep-checkpoints 1",
        "clipself",
    )
    run_in_two_parts(
        f"finetune {LOOP} --backbone align-finished --data shards --val photos --label-smoothing 0.2 "
        "--optimizer muon --max-bad-share 0.2 --warmup-steps 3 --keep-checkpoints 1",
        "finetune",
    )
    run_in_two_parts(
        f"pretrain {LOOP} --scenes 24 --val-scenes 8 --width 8 --depth 1 --num-heads 2 --patch-size 8 "
        "--warmup-steps 3 --keep-checkpoints 1",
        "pretrain",
    )
    run_in_two_parts("vlm train --config vlm.yaml", "vlm")
    run_in_two_parts("vlm train --config vlm.yaml --sharding full", "vlm-sharded")
    run("vlm export vlm-finished --out vlm-export --dtype bfloat16")


def make_evaluations() -> None:
    """Probing results, demos, benchmark answers, and a reproduced figure."""
    run(
        "probe before=start,after=align-finished --train-scenes 32 --test-scenes 16 --batch-size 8 --steps 4 "
        "--heads linear,transformer --cache disk --cache-dir probe-cache --device cpu --out probe"
    )
    run(
        "demo --steps 2 --batch-size 4 --probe-steps 2 --probe-batch 8 --train-scenes 16 --test-scenes 16 "
        "--workers 0 --device cpu --out demo"
    )
    run(
        "vlm demo --models baseline-mlp --scenes 8 --questions 4 --test-scenes 4 --llm-steps 2 --steps 2 "
        "--batch-size 4 --device cpu --out vlm-demo"
    )
    run("vlm eval vlm-finished --benchmarks scenes --data vlm-demo/test --device cpu --out eval")
    run("reproduce fig7 --quick --device cpu --out reproduce")


# -- expected results ------------------------------------------------------------------------------------


def picture() -> Image.Image:
    """A photo, resized to the input size of the backbones."""
    return Image.open(PICTURE).convert("RGB").resize((24, 24))


@torch.no_grad()
def outputs() -> dict[str, Tensor]:
    """The outputs of exports for one picture."""
    images = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None]
    found: dict[str, Tensor] = {}
    for name in ("start", "align-finished"):
        backbone: Any = localign.load(name)
        found[f"tokens {name}"] = backbone.tokens(backbone.normalise(images))
    keep = torch.arange(9).remainder(2).eq(0)[None, None]
    student: Any = localign.load("align-finished", decoder=True)
    found["reconstruction"] = student(backbone.normalise(images), keep)
    classifier = load_classifier("finetune-finished")
    found["logits"] = classifier(classifier.backbone.normalise(images))
    return {name: value.contiguous() for name, value in found.items()}


def generated() -> list[int]:
    """The tokens that the exported vision-language model generates, loaded with transformers' Auto classes."""
    model = AutoModelForImageTextToText.from_pretrained("vlm-export", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained("vlm-export")
    batch = processor(text=[QUESTION], images=[picture()], return_tensors="pt")
    return [int(t) for t in model.generate(**batch, max_new_tokens=12, do_sample=False)[0]]


def facts() -> dict[str, Any]:
    """Results of resumed runs, answers, a plan, and the names of all recipes."""
    read: Any = lambda path: json.loads(Path(path).read_text())  # noqa: E731
    runs = {}
    for folder in sorted(Path().glob("*-finished")):
        results, state = read(folder / "results.json"), sorted(folder.glob("checkpoints/*/state.json"))
        stopped = sorted(Path(f"{str(folder).removesuffix('-finished')}-stopped").glob("checkpoints/step-*"))
        runs[str(folder).removesuffix("-finished")] = {
            "stopped_at": int(stopped[-1].name.removeprefix("step-")),
            "digest": results["samples_digest"],
            "final": results["final"],
            "skipped_images": list(results["skipped_images"]["images"]),
            "fingerprint": read(state[-1])["fingerprint"],
        }
    chat = f'vlm chat vlm-finished {PICTURE} --question "{QUESTION}" --max-new-tokens 12 --device cpu'
    run("plan --config plan.yaml")
    plan = read("plan.json")
    Path("plan.json").unlink()
    recipes = run("list recipes").splitlines()
    names = [line.split("│")[1].strip() for line in recipes if line.startswith("│")]
    return {
        "localign": localign.__version__,
        "runs": runs,
        "question": QUESTION,
        "picture": PICTURE,
        "chat": run(chat).splitlines()[0],
        "generated": generated(),
        "plan": {k: plan[k] for k in ("parameters", "trained", "flops", "steps", "images")},
        "shard_mtimes": {p.name: p.stat().st_mtime_ns for p in sorted(Path("shards").glob("*.tar"))},
        "recipes": [name for name in names if name],
    }


def tidy() -> None:
    """Delete large files and files that name this machine; the tests do not read them."""
    weights = ("demo/align-seed0", "vlm-demo/baseline-mlp-seed0", "reproduce/*/align/*")
    large = [f"{run}/{part}" for run in weights for part in ("checkpoints", "export")]
    large += [f"{name}-finished/checkpoints" for name in ("clipself", "finetune", "pretrain", "vlm")]
    # The sharded run ends with the same weights as the unsharded run.
    for pattern in (*large, "vlm-sharded-finished", "vlm-demo/llm", "demo/probe-seed*", "*/tables"):
        for path in Path().glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for pattern in (".lock", "report.html", "pictures.npz", "*.png", "*.pdf", "*.svg", "*.csv", "*.tex"):
        for path in Path().rglob(pattern):
            if path.parts[0] != "photos" and path.parts[:2] != ("vlm-demo", "test"):
                path.unlink()


def make(out: Path) -> None:
    """Make all files in a new folder."""
    out.mkdir(parents=True)
    os.chdir(out)
    torch.set_num_threads(1)
    for part in (
        write_photos,
        write_conversations,
        write_language_model,
        write_recipes,
        make_runs,
        make_evaluations,
    ):
        part()
    save_file(outputs(), "expected.safetensors")
    Path("expected.json").write_text(json.dumps(facts(), indent=1) + "\n")
    tidy()


if __name__ == "__main__":
    make(Path(sys.argv[1]))
