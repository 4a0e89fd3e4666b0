"""The suite on a fake backbone, in one process or, under torchrun, in several.

`python probe_ranks.py FOLDER` writes `FOLDER/<cache>.json` and the heads' weights for every cache mode.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from probing_toys import Colours, fake_backbone
from safetensors.torch import save_file

from localign.engine.distributed import distributed_context
from localign.options.names import Cache
from localign.probing import ProbeConfig, probe_heads

CACHES: tuple[Cache, ...] = ("none", "disk", "device")


def run(folder: Path) -> None:
    """Probe in every mode; the main rank writes."""
    folder.mkdir(parents=True, exist_ok=True)
    with distributed_context("cpu") as context:
        for cache in CACHES:
            config = ProbeConfig(
                heads=("linear", "transformer", "transformer-anonymous"),
                tasks=("local", "global", "majority"),
                steps=10, batch=8, lr=1e-2, final_lr=1e-3, seeds=2, extract_batch=4, curve_images=7, cache=cache,
                cache_dtype="float32", protocol="published" if cache == "disk" else "fixed",
            )  # fmt: skip
            probed = probe_heads(
                fake_backbone(), Colours(21, "train"), Colours(13, "val"), config, context=context,
                cache_folder=folder / "cache",
            )  # fmt: skip
            if context.is_main:
                (folder / f"{cache}.json").write_text(json.dumps([p.outcome for p in probed]))
                weights = {
                    f"{p.trained.seed} {spec.label} {spec.task} {name}": value
                    for p in probed
                    for spec, head in p.trained.heads.items()
                    for name, value in head.state_dict().items()
                }
                save_file(weights, folder / f"{cache}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
