"""`localign vlm train`, `check`, `convert`, `export`, `swap`, and `eval` with either engine."""

from __future__ import annotations

from pathlib import Path

import torch

from localign.backbones.publishing.push import publish
from localign.engine import train
from localign.engine.distributed import is_main_process
from localign.engine.log import print_results
from localign.files.output import VLM_EXPORT_FILES
from localign.options.vlm.evaluation import EvalConfig
from localign.options.vlm.tools import CheckConfig, ConvertConfig, SwapConfig, VLMExportConfig
from localign.options.vlm.train import VLMConfig
from localign.planning.vlm import plan_vlm, print_vlm_plan
from localign.text.printing import printable
from localign.vlm.data import mixtures
from localign.vlm.data.checks import CheckResult, check
from localign.vlm.data.examples import ConversationTokenizer
from localign.vlm.data.prompts import prompt_format
from localign.vlm.data.vocabulary import add_special_tokens
from localign.vlm.evaluation.run import run_eval as run_own_eval
from localign.vlm.model.build import load_tokenizer, load_vlm, save_vlm, swap, vlm_card
from localign.vlm.model.llava import save_llava
from localign.vlm.model.processing import LocalignVLMProcessor
from localign.vlm.task import VLMTask


def run_vlm_train(config: VLMConfig) -> None:
    """Train a vision-language model and print the results, or print the plan of a dry run.

    Raises:
        UserError: Options or data are bad.
        RunFailure: The run cannot continue.
    """
    if config.dry_run:
        print_vlm_plan(plan_vlm(config)[1], config.plan_ranks)
        return
    task = VLMTask(config)
    for option, data in (("--data", task.data), ("--val", task.val_data)):
        if data is not None and data.malformed.count and is_main_process():
            print(f"left out   {data.malformed.count:,} malformed records of {option}, among them:")
            print("\n".join(f"           {line}" for line in data.malformed.first))
    outcome = train(task, config, "vlm train")
    if outcome.is_main:
        print_results(outcome.folder, outcome.results)


def run_check(config: CheckConfig) -> int:
    """Check conversations and print the findings.

    Returns:
        The exit code: 2 if training would refuse to start, else 0.

    Raises:
        UserError: A file or the tokenizer cannot be read.
    """
    encoder = None
    if config.llm is not None:
        tokenizer = load_tokenizer(config.llm)
        add_special_tokens(tokenizer)
        encoder = ConversationTokenizer(
            prompt_format(config.prompt), tokenizer, config.image_tokens, config.max_length
        )
    found = check(
        config.data,
        config.images,
        allow_outside=config.allow_outside,
        encoder=encoder,
        missing_list=config.missing_list,
    )
    _print_check(found)
    return 0 if found.ready else 2


def _print_check(found: CheckResult) -> None:
    print(f"records    {found.records:,}, {found.text_only:,} of them text only; {found.turns:,} turns")
    print(
        f"images     {found.images:,}, {len(found.missing):,} missing (in {found.missing_records:,} records)"
    )
    for name in found.missing[:5]:
        print(f"           missing: {printable(name)}")
    for title, finding in (
        ("malformed", found.malformed),
        ("empty", found.empty_answers),
        ("unanswered", found.unanswered),
        ("same id", found.repeated_ids),
        ("cut", found.over_long),
        ("unusable", found.nothing_to_learn),
    ):
        if finding.count:
            print(f"{title:<10} {finding.count:,}: {'; '.join(map(printable, finding.first[:3]))}")
    if found.unused_keys:
        keys = ", ".join(f"{printable(k)} ({n:,} records)" for k, n in list(found.unused_keys.items())[:10])
        print(f"not used   {keys}")
    for length in found.lengths or ():
        print(f"tokens     {length.at_least:>6,} or more: {length.records:,} records")
    counts = {"--skip-malformed": found.malformed.count, "--skip-missing": len(found.missing)}
    options = " ".join(option for option, count in counts.items() if count)
    refused = "no: training would refuse to start" + (f" without {options}" if options else "")
    print(f"ready      {'yes' if found.ready else refused}")


def run_convert(config: ConvertConfig) -> None:
    """Build a published mixture of conversations and print its size.

    Raises:
        UserError: A file or an image is missing or malformed.
    """
    if config.what == "ocr-vqa":
        prepared = mixtures.prepare_ocr_vqa(config.add or "")
        print(f"written    {prepared.written:,} JPEG files; {prepared.present:,} existed before")
        for unreadable in prepared.unreadable:
            print(f"unreadable {printable(unreadable)}")
        return
    base, add, out = config.base or "", config.add or "", config.out or ""
    if config.what == "lvis":
        written = mixtures.merge_lvis_instruct(base, add, config.images, out)
    elif config.what == "lrv":
        written = mixtures.merge_lrv_instruct(base, add, config.images, out, before=config.before)
    else:
        written = mixtures.strip_text_only(base, out)
    print(f"written    {printable(written.file)}: {written.records:,} records")


def run_vlm_export(config: VLMExportConfig) -> None:
    """Write a trained model as a transformers folder.

    Raises:
        UserError: The folder holds no model, the model is damaged or does not fit the format, or the Hub refuses the
            export.
    """
    model, tokenizer = load_vlm(config.model)
    model.eval().to(dtype=getattr(torch, config.dtype))  # type: ignore[no-untyped-call]
    processor = LocalignVLMProcessor.for_model(model, tokenizer)
    if config.format == "llava":
        difference = save_llava(model, processor, Path(config.out))
        print(f"export     {printable(config.out)}: a LLaVA model, logits within {difference:.1e}")
    else:
        print(f"export     {printable(save_vlm(model, processor, Path(config.out)))}")
    card = vlm_card(model, Path(config.out), config.format, config.push_to)
    publish(Path(config.out), card, VLM_EXPORT_FILES, private=config.private)


def run_swap(config: SwapConfig) -> None:
    """Put another tower and adapter into a LLaVA model and write the result.

    Raises:
        UserError: A part is missing or damaged, or does not fit another part.
    """
    model, tokenizer = swap(config)
    model.to(dtype=getattr(torch, config.dtype))  # type: ignore[call-arg]
    tower = model.vision.configs[0]
    block = f"block {tower.layer + 1}, {'normed' if tower.norm else 'before its norm'}"
    print(f"tower      {printable(model.vision.name)}: {block}; {model.vision.num_tokens} tokens per image")
    print(f"adapter    {config.adapter}; images are brought to size by {model.config.resize}")
    save_vlm(model, LocalignVLMProcessor.for_model(model, tokenizer), Path(config.out))
    print(f"export     {printable(config.out)}")
    if config.adapter != "keep":
        print(f"next       localign vlm train --init {printable(config.out)} --stage align --data FILE")


def run_eval(config: EvalConfig) -> None:
    """Evaluate a model on benchmarks, with our engine or lmms-eval.

    Raises:
        UserError: Options, files or answers are bad.
    """
    if config.engine == "lmms-eval":
        from localign.vlm.lmms.run import run_lmms_eval  # needs an extra of the package

        run_lmms_eval(config)
    else:
        run_own_eval(config)
