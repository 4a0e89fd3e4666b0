"""Draw the pictures of README and the site.

python scripts/docs_pictures.py architecture      # from the import statements
python scripts/docs_pictures.py similarity RUN     # from an aligned run on scenes, such as runs/demo/align-seed0
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from rooms import ROOT, imports, room_of, table

PICTURES = ROOT / "docs" / "pictures"
BOX_HEIGHT, GAP_X, GAP_Y, CHARACTER, MARGIN = 34, 16, 44, 7.1, 12
_STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #1f2a33; }
  rect { fill: #eef2f5; stroke: #7d8f9b; }
  rect.ground { fill: #dfe6ea; }
  path { fill: none; stroke: #7d8f9b; stroke-opacity: 0.75; }
  .back { fill: #ffffff; stroke: none; }
"""


# -- architecture ---------------------------------------------------------------------------------------------


def architecture() -> str:
    """The rooms of CONTRIBUTING's table as boxes, with an arrow from each to those that it imports, as SVG.

    The first row, the ground floor, is one box without arrows, because nearly all rooms import it. Arrows that follow
    from two others are left out.
    """
    ground, *rows = table()
    links = reduced(row_imports(rows))
    layers: dict[int, list[int]] = {}
    height: dict[int, int] = {}
    for row in range(len(rows)):  # a row imports earlier rows only
        height[row] = max((height[below] + 1 for below in links[row]), default=0)
        layers.setdefault(height[row], []).append(row)
    labels = [", ".join(map(_short, row)) for row in rows]
    widths = [len(label) * CHARACTER + 20 for label in labels]
    _sort(layers, links)
    total = max(sum(widths[r] + GAP_X for r in layer) for layer in layers.values()) + 2 * MARGIN
    bottom = MARGIN + len(layers) * (BOX_HEIGHT + GAP_Y)
    place: dict[int, tuple[float, float]] = {}
    for level, layer in layers.items():
        x = (total - sum(widths[r] + GAP_X for r in layer) + GAP_X) / 2
        for row in layer:
            place[row] = x, bottom - (level + 1) * (BOX_HEIGHT + GAP_Y)
            x += widths[row] + GAP_X
    parts = [_arrow(place[a], widths[a], place[b], widths[b]) for a in links for b in sorted(links[a])]
    parts += [_box(*place[r], widths[r], labels[r]) for r in range(len(rows))]
    text = "for all: " + ", ".join(map(_short, ground))
    parts.append(_box(MARGIN, bottom, total - 2 * MARGIN, text, "ground"))
    return _svg(total, bottom + BOX_HEIGHT + MARGIN, parts)


def row_imports(rows: Sequence[Sequence[str]]) -> dict[int, set[int]]:
    """Row -> the other rows that its modules import."""
    of_room = {room: number for number, row in enumerate(rows) for room in row}
    links: dict[int, set[int]] = {number: set() for number in range(len(rows))}
    pairs = ((a, b) for a, others in imports().items() for b in others if "localign" not in (a, b))
    for row, below in ((of_room.get(room_of(a)), of_room.get(room_of(b))) for a, b in pairs):
        if row is not None and below is not None and row != below:
            links[row].add(below)
    return links


def reduced(links: Mapping[int, set[int]]) -> dict[int, set[int]]:
    """Without the links that follow from a path of others."""
    reached: dict[int, set[int]] = {}
    for row in sorted(links):
        reached[row] = links[row].union(*(reached[below] for below in links[row]))
    return {row: below - set().union(*(reached[other] for other in below)) for row, below in links.items()}


def _sort(layers: Mapping[int, list[int]], links: Mapping[int, set[int]]) -> None:
    """Order each layer by the mean place of the boxes below it, so that few arrows cross."""
    place: dict[int, float] = {}
    for level in sorted(layers):
        layer = layers[level]
        means = {r: sum(place[b] for b in links[r]) / len(links[r]) if links[r] else 0.0 for r in layer}
        layer.sort(key=lambda row: (means[row], row))
        for number, row in enumerate(layer):
            place[row] = (number + 0.5) / len(layer)


def _short(room: str) -> str:
    name = room.removeprefix("localign.").replace(".", "/")
    return name.removesuffix("/command") + " (command)" if name.endswith("/command") else name


def _box(x: float, y: float, width: float, label: str, kind: str = "room") -> str:
    middle = f'x="{x + width / 2:.1f}" y="{y + BOX_HEIGHT / 2 + 4:.1f}" text-anchor="middle"'
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{BOX_HEIGHT}" rx="5"/>'
        f"<text {middle}>{escape(label)}</text>"
    )


def _arrow(start: tuple[float, float], width: float, end: tuple[float, float], other: float) -> str:
    x1, y1 = start[0] + width / 2, start[1] + BOX_HEIGHT
    x2, y2 = end[0] + other / 2, end[1] - 2
    bend = (y2 - y1) / 2
    return (
        f'<path marker-end="url(#tip)" d="M{x1:.1f} {y1:.1f} '
        f'C{x1:.1f} {y1 + bend:.1f} {x2:.1f} {y2 - bend:.1f} {x2:.1f} {y2:.1f}"/>'
    )


def _svg(width: float, height: float, parts: Sequence[str], title: str = "rooms of the package") -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img" aria-label="{title}">'
    )
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8" /></marker></defs>'
    )
    back = f'<rect class="back" width="{width:.0f}" height="{height:.0f}"/>'
    return "\n".join([head, f"<style>{_STYLE}</style>", tip, back, *parts, "</svg>", ""])


# -- similarity -----------------------------------------------------------------------------------------------


def similarity(run: str, scenes: Sequence[int] = (2, 7, 111)) -> None:
    """Write similarity.svg: test scenes with one patch marked, and every patch's similarity to it before and after.

    Args:
        run: A run folder of an alignment of the embedded backbone.
        scenes: Positions in the test split, below 200.
    """
    import matplotlib.pyplot as plt
    import numpy as np
    import torch
    from matplotlib.patches import Rectangle

    import localign
    from localign.data.cached_scenes import CachedScenes

    plt.rcParams.update({"svg.hashsalt": "localign", "svg.fonttype": "path", "font.size": 8})
    models = {"before": localign.load("scenes-vit"), "after": localign.load(run)}
    source = CachedScenes(split="test", length=200)
    pictures, maps = zip(*(source.load_labelled(i) for i in range(len(source))), strict=True)
    images = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2)
    found = {title: centred_similarities(model, images) for title, model in models.items()}
    height, width = models["before"].patch_size
    figure, axes = plt.subplots(len(scenes), 3, figsize=(3.8, 1.2 * len(scenes)), constrained_layout=True)
    for row, scene in zip(axes, scenes, strict=True):
        patch = marked_patch(maps[scene], (height, width))
        row[0].imshow(pictures[scene])
        corner = (patch[1] * width - 0.5, patch[0] * height - 0.5)
        row[0].add_patch(Rectangle(corner, width, height, fill=False, edgecolor="white", linewidth=1.6))
        for axis, (title, values) in zip(row[1:], found.items(), strict=True):
            shown = axis.imshow(values[scene][patch], cmap="viridis", vmin=0, vmax=1)
            axis.set_title(title if scene == scenes[0] else "")
        for axis in row:
            axis.set_axis_off()
    figure.colorbar(shown, ax=axes, shrink=0.6, label="similarity")
    figure.savefig(PICTURES / "similarity.svg", metadata={"Date": None})
    of_object = {title: contrast(values, np.stack(maps)) for title, values in found.items()}
    print("similarity inside an object minus that to all other patches, mean over 200 scenes:", of_object)


def marked_patch(labels: Any, patch: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the patch with the largest share of objects; ``labels`` is a map, ``(height, width)``."""
    import numpy as np

    rows, columns = labels.shape[0] // patch[0], labels.shape[1] // patch[1]
    filled = (np.asarray(labels) != 0).reshape(rows, patch[0], columns, patch[1]).mean(axis=(1, 3))
    row, column = np.unravel_index(filled.argmax(), filled.shape)
    return int(row), int(column)


def centred_similarities(model: Any, images: Any) -> Any:
    """Cosine similarity of all pairs of patches of each image: ``(images, rows, columns, rows, columns)``.

    The mean embedding of all patches of all images is subtracted first: all embeddings share it, and it says nothing
    about the content of a patch.
    """
    import torch
    import torch.nn.functional as F

    with torch.no_grad():
        tokens = model.tokens(model.normalise(images))[:, model.num_prefix_tokens :]
    unit = F.normalize(tokens - tokens.mean((0, 1)), dim=-1)
    rows, columns = model.grid
    return (unit @ unit.mT).reshape(len(images), rows, columns, rows, columns).numpy()


def contrast(similarity: Any, maps: Any) -> float:
    """Mean similarity of patches of one object minus that of its patches to all others, over all scenes.

    Args:
        similarity: See :func:`centred_similarities`.
        maps: Label maps, ``(images, height, width)``; 0 is background.
    """
    import numpy as np

    count, rows, columns = similarity.shape[:3]
    n = rows * columns
    tiles = (
        maps.reshape(count, rows, maps.shape[1] // rows, columns, -1)
        .transpose(0, 1, 3, 2, 4)
        .reshape(count, n, -1)
    )
    main = tiles[:, :, tiles.shape[2] // 2]
    whole = (tiles == main[..., None]).mean(-1) > 0.6  # otherwise a border
    objects, known = whole & (main != 0), whole
    same = (
        (main[:, :, None] == main[:, None]) & objects[:, :, None] & objects[:, None] & ~np.eye(n, dtype=bool)
    )
    other = (main[:, :, None] != main[:, None]) & objects[:, :, None] & known[:, None]
    flat = similarity.reshape(count, n, n)
    return round(float(flat[same].mean() - flat[other].mean()), 3)


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    if sys.argv[1:] == ["architecture"]:
        (PICTURES / "architecture.svg").write_text(architecture(), encoding="utf-8")
    elif len(sys.argv) == 3 and sys.argv[1] == "similarity":
        similarity(sys.argv[2])
    else:
        sys.exit(__doc__)
