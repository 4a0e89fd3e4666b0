"""The loss by liger-kernel: it equals the chunked loss, and errors are one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from vlm_models import mixed_records, packed, tiny_vlm

from localign.cli import main
from localign.errors import UserError

CASES = Path(__file__).with_name("liger_cases.py")
TRAIN = "vlm train --data missing.json --llm missing --cross-entropy liger --device"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="needs the extra localign[liger]")
def test_liger_computes_what_the_chunks_do() -> None:
    # Triton chooses its interpreter on import, so the tests run in another process.
    interpreter = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", str(CASES)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **interpreter},
        capture_output=True,
        text=True,
    )
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE), done.stdout + done.stderr
    assert done.returncode == 0
    assert "skipped" not in done.stdout


def test_liger_without_cuda_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN.split(), "cpu"]) == 2
    assert capsys.readouterr().err.strip().endswith("--cross-entropy liger needs a CUDA device, not cpu")


def test_a_missing_package_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localign.vlm.task.choose_device", lambda name: torch.device("cuda"))
    for name in [n for n in sys.modules if n.partition(".")[0] == "liger_kernel"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert main([*TRAIN.split(), "cuda"]) == 2
    line = "--cross-entropy liger needs the package liger-kernel: pip install 'localign[liger]'"
    assert capsys.readouterr().err.strip().endswith(line)


def test_an_output_layer_with_low_rank_updates_is_refused() -> None:
    peft = pytest.importorskip("peft", reason="needs the extra localign[lora]")
    model, tokenizer = tiny_vlm()
    lora = peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model.language_model = peft.get_peft_model(model.language_model, lora)
    with pytest.raises(UserError, match=r"needs a torch.nn.Linear output layer, not peft\..*Linear$"):
        model(**packed(mixed_records(model, tokenizer)), cross_entropy="liger")
