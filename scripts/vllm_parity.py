"""Compare vLLM's greedy answer with localign's, on a tiny random model.

    python scripts/vllm_parity.py write FOLDER   # where localign is installed
    python scripts/vllm_parity.py ask FOLDER     # where vLLM is installed; localign is not needed

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


def write(folder: Path) -> None:
    """Write a model with a soft-capped tower and its decoder as adapter, a picture, and localign's answer."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "vlm"))
    import torch
    from tiny_vlm import TEXT_WIDTH, tiny_llm, tiny_tokenizer
    from vlm_models import aligned_source, picture, tiny_processor

    from localign.vlm import LocalignVLM
    from localign.vlm.model.build import save_vlm
    from localign.vlm.model.presets import build_vision

    tower, adapter = build_vision("decoder", [aligned_source()], TEXT_WIDTH)
    with torch.no_grad():  # the output layer starts at zero
        for parameter in adapter.parameters():
            parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter))
    tokenizer = tiny_tokenizer()
    llm = tiny_llm(head_dim=32)  # the smallest width that vLLM's CPU kernel takes
    model: Any = LocalignVLM.from_parts(tower, adapter, llm, tokenizer, prompt_format="vicuna").eval()  # type: ignore[no-untyped-call]
    processor = tiny_processor(model, tokenizer)
    save_vlm(model, processor, folder)
    picture(3).save(folder / "picture.png")
    batch = processor(text=CHAT_TEXT, images=picture(3))
    ids = model.generate(**batch, max_new_tokens=NEW, do_sample=False)[0].tolist()
    length = batch["input_ids"].shape[1]
    (folder / "expected.json").write_text(json.dumps({"prompt": ids[:length], "answer": ids[length:]}))


def ask(folder: Path) -> int:
    """Ask vLLM the same question; returns the exit code."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"trust_remote_code": True, "model_impl": "transformers", "dtype": "float32"}
    llm = LLM(model=str(folder), max_model_len=512, enforce_eager=True, **options)
    part = {"type": "image_pil", "image_pil": Image.open(folder / "picture.png")}
    chat: Any = [{"role": "user", "content": [part, {"type": "text", "text": CHAT_TEXT}]}]
    (output,) = llm.chat(chat, SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True))
    found = {"prompt": list(output.prompt_token_ids), "answer": list(output.outputs[0].token_ids)}
    expected = json.loads((folder / "expected.json").read_text())
    print(
        f"prompt equal: {found['prompt'] == expected['prompt']}; answer {found['answer']}, {expected['answer']}"
    )
    return int(found != expected)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("write", "ask"):
        sys.exit(__doc__)
    sys.exit((write if sys.argv[1] == "write" else ask)(Path(sys.argv[2])))
