"""The suite on a fake backbone, in one process or as one of several ranks."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path

import torch
from probing_toys import Colours, fake_backbone
from safetensors.torch import save_file

from localign.engine.distributed import distributed_context
from localign.options.names import Cache
from localign.probing import ProbeConfig, probe_heads

MODES: dict[str, Cache] = {"none": "none", "disk": "disk", "device": "device", "until-converged": "device"}
"""Name of the files -> cache mode."""


def run(folder: Path) -> None:
    """Probe in every mode. The main rank writes ``<mode>.json`` and the heads' weights into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with distributed_context("cpu") as context:
        for mode, cache in MODES.items():
            config = ProbeConfig(
                heads=("linear", "transformer"), tasks=("local", "global", "majority"),
                steps=6, batch=8, lr=1e-2, final_lr=1e-3, seeds=2, extract_batch=4, curve_images=7, cache=cache,
                cache_dtype="float32", protocol="published" if cache == "disk" else "fixed",
                until_converged=mode == "until-converged", max_steps=6,
            )  # fmt: skip
            probed = probe_heads(
                fake_backbone(), Colours(21, "train"), Colours(13, "val"), config, context=context,
                cache_folder=folder / "cache",
            )  # fmt: skip
            if context.is_main:
                (folder / f"{mode}.json").write_text(json.dumps([p.outcome for p in probed]))
                weights = {
                    f"{p.trained.seed} {spec.label} {spec.task} {name}": value
                    for p in probed
                    for spec, head in p.trained.heads.items()
                    for name, value in head.state_dict().items()
                }
                save_file(weights, folder / f"{mode}.safetensors")


def run_on_ranks(folder: Path, size: int) -> None:
    """:func:`run` in several ranks. They are forks of one fresh process that has imported what they need."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")  # this process may have threads, of autograd for one
    context.set_forkserver_preload(["localign.probing", "safetensors.torch"])
    ranks = [context.Process(target=_run_rank, args=(folder, rank, size, port)) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
    for process in ranks:
        process.kill()
    assert [process.exitcode for process in ranks] == [0] * size


def _run_rank(folder: Path, rank: int, size: int, port: int) -> None:
    places = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    run(folder)
