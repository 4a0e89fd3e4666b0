"""The same small pictures as a folder, tar shards, parquet files and a mixture."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COUNT = 23


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 JPEG files in two class folders."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(COUNT):
        values = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        path = root / ("cat" if i < 10 else "dog") / f"{i:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(values).resize((40, 30)).save(path)
    return root


@pytest.fixture(scope="session")
def shards(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three tar shards of the pictures, with a text file after each image."""
    root = tmp_path_factory.mktemp("shards")
    files = sorted(pictures.rglob("*.jpg"))
    for number, first in enumerate(range(0, COUNT, 9)):
        with tarfile.open(root / f"part-{number:03}.tar", "w") as tar:
            for file in files[first : first + 9]:
                name = str(file.relative_to(pictures))
                tar.add(file, name)
                tar.add(__file__, name.replace(".jpg", ".txt"))
    return root


@pytest.fixture(scope="session")
def rows(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two parquet files of the pictures, in row groups of five, written as by the library `datasets`."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    root = tmp_path_factory.mktemp("rows")
    files = sorted(pictures.rglob("*.jpg"))
    about = '{"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}'
    for number, part in enumerate((files[:12], files[12:])):
        images = [{"bytes": file.read_bytes(), "path": file.name} for file in part]
        labels = [int(file.parent.name == "dog") for file in part]
        table = pa.table({"image": images, "label": labels}).replace_schema_metadata({"huggingface": about})
        pq.write_table(table, root / f"train-{number}.parquet", row_group_size=5)
    return root


@pytest.fixture(scope="session")
def mixture(pictures: Path, shards: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of all three; the parquet files have the largest weight."""
    file = tmp_path_factory.mktemp("mixture") / "mix.yaml"
    (file.parent / "bad.txt").write_text("cat/03.jpg\ndog/20.jpg\n")
    file.write_text(
        "mixture:\n"
        f"  - {{data: {pictures}, weight: 1, exclude: bad.txt}}\n"
        f"  - {{data: '{shards}/*.tar', weight: 2}}\n"
        f"  - {{data: {rows}, weight: 5}}\n"
    )
    return file
