"""What each sub-command does: from a config object to a result on disk and a few lines on the screen.

Heavy imports wait until a command runs, so that --help and error lines come at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localign.errors import UserError

if TYPE_CHECKING:
    from localign.finetuning import FinetuneConfig
    from localign.options.align import AlignConfig
    from localign.options.datatools import DataVerifyConfig, In21kConfig, ShardConfig, StatsConfig
    from localign.options.demo import DemoConfig
    from localign.options.export import ExportConfig, ImportConfig, ReportConfig, VerifyConfig
    from localign.options.pretrain import PretrainConfig
    from localign.options.probe import ProbeCommandConfig
    from localign.options.vlm.demo import VLMDemoConfig
    from localign.options.vlm.evaluation import EvalConfig, ScoreConfig, ShowConfig
    from localign.options.vlm.tools import ChatConfig, CheckConfig, ConvertConfig, VLMExportConfig
    from localign.options.vlm.train import VLMConfig
    from localign.reproduce import ReproduceConfig


def demo_config() -> type:
    from localign.options.demo import DemoConfig

    return DemoConfig


def align_config() -> type:
    from localign.options.align import AlignConfig

    return AlignConfig


def plan_config() -> type:
    from localign.options.plan import PlanConfig

    return PlanConfig


def pretrain_config() -> type:
    from localign.options.pretrain import PretrainConfig

    return PretrainConfig


def finetune_config() -> type:
    from localign.options.finetune import FinetuneConfig

    return FinetuneConfig


def probe_config() -> type:
    from localign.options.probe import ProbeCommandConfig

    return ProbeCommandConfig


def reproduce_config() -> type:
    from localign.options.reproduce import ReproduceConfig

    return ReproduceConfig


def export_config() -> type:
    from localign.options.export import ExportConfig

    return ExportConfig


def import_config() -> type:
    from localign.options.export import ImportConfig

    return ImportConfig


def report_config() -> type:
    from localign.options.export import ReportConfig

    return ReportConfig


def verify_config() -> type:
    from localign.options.export import VerifyConfig

    return VerifyConfig


def vlm_config() -> type:
    from localign.options.vlm.train import VLMConfig

    return VLMConfig


def chat_config() -> type:
    from localign.options.vlm.tools import ChatConfig

    return ChatConfig


def vlm_demo_config() -> type:
    from localign.options.vlm.demo import VLMDemoConfig

    return VLMDemoConfig


def check_config() -> type:
    from localign.options.vlm.tools import CheckConfig

    return CheckConfig


def convert_config() -> type:
    from localign.options.vlm.tools import ConvertConfig

    return ConvertConfig


def vlm_export_config() -> type:
    from localign.options.vlm.tools import VLMExportConfig

    return VLMExportConfig


def eval_config() -> type:
    from localign.options.vlm.evaluation import EvalConfig

    return EvalConfig


def score_config() -> type:
    from localign.options.vlm.evaluation import ScoreConfig

    return ScoreConfig


def show_config() -> type:
    from localign.options.vlm.evaluation import ShowConfig

    return ShowConfig


def shard_config() -> type:
    from localign.options.datatools import ShardConfig

    return ShardConfig


def data_verify_config() -> type:
    from localign.options.datatools import DataVerifyConfig

    return DataVerifyConfig


def stats_config() -> type:
    from localign.options.datatools import StatsConfig

    return StatsConfig


def in21k_config() -> type:
    from localign.options.datatools import In21kConfig

    return In21kConfig


def demo(config: DemoConfig) -> None:
    from localign.demo import run_demo

    run_demo(config)


def align(config: AlignConfig) -> None:
    from localign.alignment import AlignTask
    from localign.alignment.setup import resolve_align
    from localign.engine import train
    from localign.pictures import example_images, save_pictures
    from localign.report import build_report

    config = resolve_align(config)
    task = AlignTask(config)
    outcome = train(task, config, "align")
    if outcome.is_main:
        save_pictures(outcome.folder, task, example_images(task))
        _say_trained(outcome.folder, outcome.results)
        print(f"report     {build_report(outcome.folder)}")


def pretrain(config: PretrainConfig) -> None:
    from localign.engine import train
    from localign.pretraining import PretrainTask

    outcome = train(PretrainTask(config), config, "pretrain")
    if outcome.is_main:
        _say_trained(outcome.folder, outcome.results)


def finetune(config: FinetuneConfig) -> None:
    from localign.finetuning import finetune as run_finetune

    outcome = run_finetune(config)
    if outcome.is_main:
        _say_trained(outcome.folder, outcome.results)


def vlm_train(config: VLMConfig) -> None:
    from localign.engine import train
    from localign.planning.vlm import plan_vlm, print_vlm_plan
    from localign.vlm.task import VLMTask

    if config.dry_run:
        print_vlm_plan(plan_vlm(config)[1], config.plan_ranks)
        return
    outcome = train(VLMTask(config), config, "vlm train")
    if outcome.is_main:
        _say_trained(outcome.folder, outcome.results)


def vlm_chat(config: ChatConfig) -> None:
    from localign.vlm.chat import run_chat

    run_chat(config)


def vlm_demo(config: VLMDemoConfig) -> None:
    from localign.vlm.demo.run import run_vlm_demo

    run_vlm_demo(config)


def vlm_check(config: CheckConfig) -> int:
    from localign.vlm.data.checks import check
    from localign.vlm.data.examples import ConversationTokenizer
    from localign.vlm.data.prompts import prompt_format
    from localign.vlm.data.vocabulary import add_special_tokens
    from localign.vlm.model.build import load_tokenizer

    encoder = None
    if config.llm is not None:
        tokenizer = load_tokenizer(config.llm)
        add_special_tokens(tokenizer)
        encoder = ConversationTokenizer(
            prompt_format(config.prompt), tokenizer, config.image_tokens, config.max_length
        )
    found = check(config.data, config.images, encoder=encoder, missing_list=config.missing_list)
    print(f"records    {found.records:,}, {found.text_only:,} of them text alone; {found.turns:,} turns")
    print(
        f"images     {found.images:,}, {len(found.missing):,} missing (in {found.missing_records:,} records)"
    )
    for name in found.missing[:5]:
        print(f"           missing: {name}")
    for title, finding in (
        ("malformed", found.malformed),
        ("empty", found.empty_answers),
        ("unanswered", found.unanswered),
        ("same id", found.repeated_ids),
        ("cut", found.over_long),
        ("unusable", found.nothing_to_learn),
    ):
        if finding.count:
            print(f"{title:<10} {finding.count:,}: {'; '.join(finding.first[:3])}")
    for length in found.lengths or ():
        print(f"tokens     {length.at_least:>6,} and more: {length.records:,} records")
    print("ready      yes" if found.ready else "ready      no: training would refuse to start")
    return 0 if found.ready else 2


def vlm_convert(config: ConvertConfig) -> None:
    from localign.vlm.data import mixtures

    if config.what == "ocr-vqa":
        done = mixtures.prepare_ocr_vqa(config.add or "")
        print(f"written    {done.written:,} JPEG files; {done.present:,} were there")
        for unreadable in done.unreadable:
            print(f"unreadable {unreadable}")
        return
    base, add, out = config.base or "", config.add or "", config.out or ""
    if config.what == "lvis":
        written = mixtures.merge_lvis_instruct(base, add, config.images, out)
    elif config.what == "lrv":
        written = mixtures.merge_lrv_instruct(base, add, config.images, out, before=config.before)
    else:
        written = mixtures.strip_text_only(base, out)
    print(f"written    {written.file}: {written.records:,} records")


def vlm_export(config: VLMExportConfig) -> None:
    import torch

    from localign.vlm.model.build import load_vlm, save_vlm
    from localign.vlm.model.processing import LocalignVLMProcessor

    model, tokenizer = load_vlm(config.model)
    model.to(dtype=getattr(torch, config.dtype))  # type: ignore[call-arg]
    processor = LocalignVLMProcessor.for_model(model, tokenizer)
    print(f"export     {save_vlm(model, processor, Path(config.out))}")


def vlm_eval(config: EvalConfig) -> None:
    if config.engine == "lmms-eval":
        from localign.vlm.lmms.run import run_lmms_eval

        return run_lmms_eval(config)
    from localign.vlm.evaluation.run import run_eval

    return run_eval(config)


def vlm_score(config: ScoreConfig) -> None:
    from localign.vlm.evaluation.score import run_score

    run_score(config)


def vlm_show(config: ShowConfig) -> None:
    from localign.vlm.evaluation.show import run_show

    run_show(config)


def _say_trained(folder: Path, results: dict[str, Any]) -> None:
    rate = results["images_per_second"]
    print(f"trained    {results['steps']} steps, {results['images']} images, {rate:.1f} images/s")
    if results["final"]:
        print("validation " + ", ".join(f"{k} {v:.4f}" for k, v in results["final"].items()))
    skipped = results["skipped_images"]
    if skipped["count"]:
        names = ", ".join(list(skipped["images"])[:5]) + (", ..." if skipped["count"] > 5 else "")
        print(f"skipped    {skipped['count']} unreadable images ({skipped['share']:.2%}): {names}")
    print(f"results    {folder / 'results.json'}")
    print(f"export     {folder / 'export'}")


def data_shard(config: ShardConfig) -> None:
    from localign.datatools.shard import run_shard

    _say_packed(run_shard(config), Path(config.out))


def data_in21k(config: In21kConfig) -> None:
    from localign.datatools.in21k import run_in21k

    made = run_in21k(config)
    print(f"classes    {made['kept']:,} of {made['classes']:,} have {config.min_images} images")
    for part in ("train", "val"):
        _say_packed(made[part], Path(config.out) / part)


def _say_packed(about: dict[str, Any], folder: Path) -> None:
    size = about["bytes"] / 2**20
    print(f"packed     {about['images']:,} images, {size:,.1f} MiB, {about['shards']:,} shards: {folder}")
    if about["left_out"]:
        print(f"left out   {about['left_out']:,} images, see {folder / 'left-out.jsonl'}")


def data_verify(config: DataVerifyConfig) -> int:
    from localign.datatools.verify import run_verify

    found = run_verify(config)
    print(f"images     {found['images']:,} decoded, {len(found['bad']):,} bad")
    for name, reason in list(found["bad"].items())[:5]:
        print(f"           {name}: {reason}")
    if found["checked"]:
        print(f"checksums  {found['checked']:,} shards compared, {len(found['shards']):,} differ")
        for name in found["shards"][:5]:
            print(f"           {name}")
    print(f"list       {config.out}, for --exclude")
    return 1 if found["bad"] or found["shards"] else 0


def data_stats(config: StatsConfig) -> None:
    from localign.datatools.stats import run_stats

    found = run_stats(config)
    print(
        f"images     {found['images']:,}; of {found['opened']:,} opened {found['unreadable']:,} are unreadable"
    )
    print("formats    " + ", ".join(f"{name} {count:,}" for name, count in found["formats"].items()))
    spread = "{min:,.0f} to {max:,.0f}, median {median:,.0f}, mean {mean:,.1f}"
    for name in ("width", "height", "bytes"):
        print(f"{name:<10} {spread.format(**found[name])}")
    if found["classes"] is not None:
        print(
            f"classes    {found['classes']['count']:,}; images in each " + spread.format(**found["classes"])
        )


def probe(config: ProbeCommandConfig) -> None:
    from localign.probing.command import run_probe

    run_probe(config)


def reproduce(config: ReproduceConfig) -> None:
    from localign.reproduce.run import run_reproduce

    run_reproduce(config)


def export(config: ExportConfig) -> None:
    from localign.alignment.export import export_student
    from localign.alignment.setup import student_of_run
    from localign.backbones import create_backbone, save_backbone
    from localign.engine.run_folder import provenance

    source = Path(config.source)
    if (source / "checkpoints").is_dir():
        if config.model_kwargs or config.image_size or config.weights != "pretrained":
            raise UserError(f"{source} is a run: its weights, image size and arguments are fixed")
        student, facts = student_of_run(source, config.checkpoint)
        folder = export_student(
            student, config.out, decoder=config.decoder, provenance={**facts, **provenance()}
        )
    else:
        backbone = create_backbone(
            config.source,
            weights=config.weights,
            image_size=config.image_size,
            model_kwargs=config.model_kwargs,
        )
        folder = save_backbone(backbone, config.out, provenance={"source": config.source, **provenance()})
    print(f"export     {folder}")


def import_(config: ImportConfig) -> None:
    from localign.alignment.export import export_student
    from localign.alignment.published import read_published
    from localign.alignment.setup import resolve_soft_cap
    from localign.backbones import create_backbone

    backbone = create_backbone(
        config.backbone, weights="none", image_size=config.image_size, model_kwargs=config.model_kwargs
    )
    student = read_published(config.file, backbone, soft_cap=resolve_soft_cap(config.soft_cap, backbone))
    facts = {"method": "MaskEmbed", "source": Path(config.file).name, "backbone": config.backbone}
    folder = export_student(student, config.out, decoder=config.decoder, provenance=facts)
    print(f"imported   {config.file} -> {folder}")


def report(config: ReportConfig) -> None:
    from localign.report import build_report

    print(f"report     {build_report(Path(config.run))}")


def verify_reference(config: VerifyConfig) -> int:
    from rich.console import Console
    from rich.table import Table

    from localign.alignment.verify import verify_reference as verify

    table = Table(caption="error: largest difference over max(1, root mean square of the reference)")
    for column in ("variant", "quantity", "error", "absolute"):
        table.add_column(column)
    results = verify(config.folder)
    for row in results:
        style = None if row.max_error <= config.tol else "bold red"
        table.add_row(
            row.variant, row.quantity, f"{row.max_error:.1e}", f"{row.max_absolute:.1e}", style=style
        )
    Console().print(table)
    worst = max(results, key=lambda r: r.max_error)
    print(
        json.dumps(
            {
                "quantities": len(results),
                "largest_error": worst.max_error,
                "of": worst.quantity,
                "tol": config.tol,
            }
        )
    )
    return 0 if worst.max_error <= config.tol else 1
