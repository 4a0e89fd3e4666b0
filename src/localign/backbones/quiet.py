"""Downloads from the Hugging Face Hub without a line for every attempt."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from localign.engine.log import say

_LOGGER = "huggingface_hub.utils._http"


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Inside, the Hub's client says once that it tries again, instead of two lines for each attempt."""
    said = False

    def is_shown(record: logging.LogRecord) -> bool:
        nonlocal said
        if not said:
            said = True
            say("the Hub does not answer; trying again for a minute")
        return False

    logger = logging.getLogger(_LOGGER)
    logger.addFilter(is_shown)
    try:
        yield
    finally:
        logger.removeFilter(is_shown)
