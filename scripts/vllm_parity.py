"""Compare vLLM's greedy answers with localign's, about pictures of several shapes, on a tiny random model.

    python scripts/vllm_parity.py write FOLDER [MAX_PATCHES]   # where localign is installed
    python scripts/vllm_parity.py ask FOLDER                   # where vLLM is installed; localign is not needed

With MAX_PATCHES the model is one of native resolution.

Exits with 1 if a token differs.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from PIL import Image

NEW = 8
CHAT_TEXT = "What is it?"
SHAPES = ((60, 20), (20, 60), (24, 24), (31, 29), (90, 6))
"""Widths and heights of the pictures."""


def write(folder: Path, max_patches: int | None = None) -> int:
    """Write a model with a soft-capped tower and its decoder as adapter, pictures, and our answers; returns 0."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "vlm"))
    import torch
    from tiny_vlm import TEXT_WIDTH, tiny_llm, tiny_tokenizer
    from vlm_models import aligned_source, picture, tiny_processor

    from localign.vlm import LocalignVLM
    from localign.vlm.model.build import save_vlm
    from localign.vlm.model.presets import build_vision

    tower, adapter = build_vision("decoder", [aligned_source()], TEXT_WIDTH)
    torch.manual_seed(0)
    for name, parameter in adapter.named_parameters():  # so large that answers depend on the picture
        torch.nn.init.normal_(parameter, std=2.0 if name.startswith("decoder.head") else 0.5)
    tokenizer = tiny_tokenizer()
    llm = tiny_llm(head_dim=32)  # the smallest width that vLLM's CPU kernel takes
    options: Any = {"prompt_format": "vicuna", "max_patches": max_patches}
    model: Any = LocalignVLM.from_parts(tower, adapter, llm, tokenizer, **options).eval()  # type: ignore[no-untyped-call]
    processor = tiny_processor(model, tokenizer)
    save_vlm(model, processor, folder)
    expected = []
    for number, shape in enumerate(SHAPES):
        image = picture(number, shape)
        image.save(folder / f"{number}.png")
        batch = processor(text=CHAT_TEXT, images=image)
        ids = model.generate(**batch, max_new_tokens=NEW, do_sample=False, eos_token_id=None)[0].tolist()
        length = batch["input_ids"].shape[1]
        expected.append({"prompt": ids[:length], "answer": ids[length:]})
    (folder / "expected.json").write_text(json.dumps(expected))
    return 0


def ask(folder: Path) -> int:
    """Ask vLLM the same questions at once; returns the exit code."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"trust_remote_code": True, "model_impl": "transformers", "dtype": "float32"}
    llm = LLM(model=str(folder), max_model_len=512, enforce_eager=True, **options)
    chats: Any = []
    for number in range(len(SHAPES)):
        part = {"type": "image_pil", "image_pil": Image.open(folder / f"{number}.png")}
        chats.append([{"role": "user", "content": [part, {"type": "text", "text": CHAT_TEXT}]}])
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True))
    found = [
        {"prompt": list(output.prompt_token_ids), "answer": list(output.outputs[0].token_ids)}
        for output in outputs
    ]
    expected = json.loads((folder / "expected.json").read_text())
    equal = sum(ours == theirs for ours, theirs in zip(expected, found, strict=True))
    distinct = len({tuple(entry["answer"]) for entry in expected})
    print(f"{equal} of {len(expected)} prompts and answers are equal; {distinct} distinct answers")
    return int(found != expected)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["write", folder]:
            sys.exit(write(Path(folder)))
        case ["write", folder, number]:
            sys.exit(write(Path(folder), int(number)))
        case ["ask", folder]:
            sys.exit(ask(Path(folder)))
    sys.exit(__doc__)
