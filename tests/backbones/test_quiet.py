"""A Hub that does not answer is one line before the error."""

from __future__ import annotations

import logging

import pytest

from localign.backbones.quiet import quiet_hub


def test_attempts_are_one_line(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("huggingface_hub.utils._http")
    with quiet_hub():
        for attempt in range(6):
            logger.warning("'[Errno 111] Connection refused' thrown while requesting HEAD http://localhost")
            logger.warning("Retrying in 1s [Retry %d/5].", attempt)
    assert capsys.readouterr().err.count("\n") == 1
    assert not caplog.records
    logger.warning("afterwards")
    assert [record.message for record in caplog.records] == ["afterwards"]
