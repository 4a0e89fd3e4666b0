"""Unreadable images do not end a run. They are logged by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from engine_runs import make_images, run, run_until, tiny

from localign.engine.log import read_log
from localign.engine.run_folder import read_results
from localign.errors import UserError


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred images, one of them truncated."""
    return make_images(tmp_path_factory.mktemp("damaged"), 100, truncated=(42,))


def logged_names(folder: Path) -> list[str]:
    return [e["skipped_image"] for e in read_log(folder) if "skipped_image" in e]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_with_one_percent_truncated_completes_and_logs_it_once(
    tmp_path: Path, damaged: Path, workers: int
) -> None:
    run(tiny(tmp_path, damaged, epochs=2, steps=None, batch_size=20, workers=workers))
    assert logged_names(tmp_path) == ["0042.png"]
    entry = next(e for e in read_log(tmp_path) if "skipped_image" in e)
    assert entry["reason"]
    skipped = read_results(tmp_path)["skipped_images"]
    assert (skipped["count"], skipped["share"]) == (1, 0.01)
    assert list(skipped["images"]) == ["0042.png"]


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_resumed_run_logs_it_once_too(tmp_path: Path, damaged: Path, stop: int) -> None:
    # The run stops before the image, after it, or between its step and the next checkpoint.
    config = tiny(tmp_path, damaged, epochs=1, steps=None, batch_size=20, log_every=2, checkpoint_every=1)
    if stop < 5:
        run_until(config, stop)
        config = replace(config, resume="must")
    run(config)
    assert logged_names(tmp_path) == ["0042.png"]
    assert list(read_results(tmp_path)["skipped_images"]["images"]) == ["0042.png"]


def test_too_many_unreadable_images_end_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    make_images(folder, 20, truncated=(3, 4, 5))
    with pytest.raises(UserError, match=r"of 20 images are unreadable .*png"):
        run(tiny(tmp_path / "run", folder, max_bad_share=0.06))
