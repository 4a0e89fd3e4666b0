"""The largest values of options, so that a slip of the keyboard is an error line and not a machine without memory."""

from __future__ import annotations

import math
from typing import Any

from localign.errors import UserError

_MOST = {
    2**10: "depth decoder_depth train_blocks seeds",
    2**12: "workers",
    2
    ** 16: "image_size scale_images resize width num_heads patch_size block_min_patches lora_rank image_tokens gpus "
    "plan_ranks",
    2**20: "batch_size micro_batch probe_batch max_new_tokens questions",
    2**24: "epochs warmup_epochs max_length keep_checkpoints repeats at_once",
    2**28: "scenes train_scenes val_scenes test_scenes val_images val_records images limit",
    2
    ** 36: "steps warmup_steps llm_steps probe_steps checkpoint_every val_every log_every shard_images min_images "
    "dataset_size timeout",
}
LIMITS = {name: most for most, names in _MOST.items() for name in names.split()}
"""Field of a config class -> the largest value. Real runs stay far below."""


def check_limit(name: str, value: Any) -> None:
    """Check a number that a user gave.

    Args:
        name: The field of the config class.
        value: Its value, of any type.

    Raises:
        UserError: The number is not a number, or larger than any use of the option.
    """
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, tuple | list):
        for item in value:
            check_limit(name, item)
    elif isinstance(value, float) and math.isnan(value):
        raise UserError(f"{option} takes a number, not nan")
    elif isinstance(value, int | float) and name in LIMITS and value > LIMITS[name]:
        raise UserError(f"{option} takes at most {LIMITS[name]:,}, not {float(min(value, 2**1000)):g}")
