"""`localign probe`: patch-level and image-level recall of one or more backbones."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from localign.backbones import Backbone, create_backbone, find_export
from localign.engine import run_folder
from localign.engine.distributed import DistributedContext, distributed_context
from localign.engine.log import Stopwatch, say
from localign.engine.progress import progress_bars
from localign.errors import UserError
from localign.options.probe import ProbeCommandConfig, file_name
from localign.pictures import save_predictions
from localign.probing import Probed, probe_heads
from localign.probing.datasets import Split, open_labelled
from localign.probing.suite import TEST_SOURCE, differences
from localign.report import build_report
from localign.report.probing import write_probe_report
from localign.report.tables.measures import comparisons
from localign.report.tables.recalls import recall_table
from localign.results import ProbeOutcome, Results
from localign.text.printing import console, printable

TRAIN_SCENES, TEST_SCENES = 6000, 4000
_LAYER_NOTE = "Tokens are those of block {}, without the final norm unless that is the last block."


def load_backbones(config: ProbeCommandConfig) -> dict[str, Backbone]:
    """Load the backbones of a command line, cut after the block of ``--layer``.

    ``--weights`` and ``--model-kwargs`` apply to names, not to exports.

    Raises:
        UserError: Such an option is given, and all backbones are exported folders; or a backbone has no such block.
    """
    options: dict[str, Any] = {
        k: v
        for k, v in (
            ("weights", config.weights if config.weights != "pretrained" else None),
            ("model_kwargs", config.model_kwargs or None),
        )
        if v is not None
    }
    named = config.named_backbones()
    exported = {name for name, source in named.items() if find_export(source) is not None}
    if options and exported == named.keys():
        option = next(iter(options)).replace("_", "-")
        raise UserError(
            f"{next(iter(named.values()))} is an exported backbone; --{option} applies to names only"
        )
    backbones = {
        name: create_backbone(source, image_size=config.image_size, **({} if name in exported else options))
        for name, source in named.items()
    }
    for backbone in backbones.values():
        _cut(backbone, config.layer)
    return backbones


def _cut(backbone: Backbone, layer: int) -> None:
    """Drop the blocks after a layer, in place, and the final norm with them.

    What follows then has the features of that layer, and caches under the hash of the tensors that are left.
    """
    blocks = backbone.block_index(layer) + 1
    if blocks < backbone.depth:
        backbone.vit.blocks = backbone.vit.blocks[:blocks]
        backbone.final_norm = "none"


def run_probe(config: ProbeCommandConfig) -> None:
    """Probe every backbone, and write results, pictures, tables, figures and the report."""
    with distributed_context(config.device) as context:
        probed = _probe_all(config, context)
    if not context.is_main:
        return
    console().print(recall_table(probed))
    folder = Path(config.out)
    written = write_probe_report(folder)
    print(
        f"results    {printable(folder / run_folder.RESULTS_FILE)}, and {len(written)} tables and figures beside it"
    )
    print(f"report     {printable(build_report(folder))}")


def _probe_all(config: ProbeCommandConfig, context: DistributedContext) -> Results:
    """Probe, and write ``results.json`` and ``pictures.npz``. Returns the content of ``results.json``."""
    clock = Stopwatch()
    probe_config = config.probe_config()
    backbones = load_backbones(config)
    train, test = (
        open_labelled(config.data, split, scenes=scenes, things_only=config.things_only, ignore=config.ignore)
        for split, scenes in _splits(config)
    )
    folder = Path(config.out)
    cache = Path(config.cache_dir) if config.cache_dir is not None else folder / "cache"
    probed: dict[str, list[Probed]] = {}
    timings = {"data": clock.elapsed}
    for name, backbone in backbones.items():
        if context.is_main:
            say(f"probing {name}")
        before = clock.elapsed
        with progress_bars(shown=context.is_main) as progress:
            probed[name] = probe_heads(
                backbone.to(context.device),
                train,
                {TEST_SOURCE: test},
                probe_config,
                context=context,
                cache_folder=cache / file_name(name),
                replace_cache=config.cache_dir is None,
                progress=progress,
                max_patches=config.max_patches,
            )
        backbone.cpu()
        timings[name] = clock.elapsed - before
    timings["total"] = clock.elapsed
    outcomes = {name: [p.outcome for p in seeds] for name, seeds in probed.items()}
    first = next(iter(outcomes.values()))[0]
    content: Results = {
        "command": "probe",
        "config": asdict(config),
        "versions": run_folder.provenance(),
        "classes": first["classes"],
        "class_kinds": first["class_kinds"],
        "protocol": first["protocol"],
        "timings": timings,
        "probe": outcomes,
    }
    content["differences"] = [
        entry
        for c in comparisons(content)
        for entry in differences(c.after, probed[c.after], c.before, probed[c.before])
    ]
    content["notes"] = _notes(config, first)
    if context.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        run_folder.save_config(folder, "probe", config)
        save_predictions(folder, backbones, probed, test)
        run_folder.write_results(folder, content)
    return content


def _splits(config: ProbeCommandConfig) -> tuple[tuple[Split, int], tuple[Split, int]]:
    """The splits to train and to report on, each with its number of scenes."""
    return ("train", config.train_scenes or TRAIN_SCENES), ("test", config.test_scenes or TEST_SCENES)


def _notes(config: ProbeCommandConfig, outcome: ProbeOutcome) -> list[str]:
    images, steps = outcome["sources"], outcome["config"]["steps"]
    chosen = {
        "converged": "Each head is trained until it converges, for at most "
        f"{outcome['config']['max_steps']} steps, and reported with the weights that had the lowest loss on "
        f"{outcome['train']['held_out']} held-out training images; nothing was chosen on the test images. A head has "
        "converged if that loss fell by less than 2 % in the last quarter of its steps.",
        "fixed": f"Figures are of the heads after the last of {steps} steps; nothing was chosen on the test images.",
        "published": f"Figures are of each head's best epoch within {steps} steps, chosen on the reported images as in "
        "the published benchmark. Such figures are optimistic.",
    }
    layer = "" if config.layer == -1 else f" {_LAYER_NOTE.format(config.layer)}"
    judged = ""
    if not config.until_converged and outcome["train"]["held_out"]:
        judged = f" {outcome['train']['held_out']} of the test images say whether a head has converged."
    return [
        f"Heads are trained on {images['train']['images']} images of {config.data} and evaluated on "
        f"{images[TEST_SOURCE]['images']}, with frozen backbones in eval mode.{layer}",
        chosen["converged" if config.until_converged else config.protocol] + judged,
        "Intervals are 95 % percentile intervals of 1000 bootstrap replicates over images. Differences are paired.",
        f"Seeds {config.seed} to {config.seed + config.seeds - 1} differ in the initial weights of the heads. The "
        "order of the samples is the same for all seeds."
        if config.seeds > 1
        else f"One seed ({config.seed}).",
    ]
