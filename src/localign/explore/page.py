"""The page: the built front end, and the data inside it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from PIL import Image

from localign.errors import UserError
from localign.files.output import PAGE_MARK

_JPEG_QUALITY = 90


def data_uri(picture: Image.Image) -> str:
    """An RGB picture as a JPEG in a data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def build_page(content: Mapping[str, Any], blob: bytes) -> str:
    """The whole document.

    Args:
        content: The page's facts, JSON-able; foreign text in it is escaped here.
        blob: The arrays.

    Raises:
        UserError: The installation lacks the front end.
    """
    template = _front_end()
    script, style = (_inside(template, tag) for tag in ("script", "style"))
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src 'sha256-{_digest(script)}'",
            f"style-src 'sha256-{_digest(style)}'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    head = f'{PAGE_MARK}\n<meta http-equiv="Content-Security-Policy" content="{policy}">'
    data = (
        f'<script type="application/json" id="content">{_json(content)}</script>\n'
        f'<script type="application/octet-stream" id="blob">{base64.b64encode(blob).decode()}</script>'
    )
    before, _, rest = template.partition("<!-- head -->")
    middle, _, after = rest.partition("<!-- data -->")
    return "".join((before, head, middle, data, after))


def _front_end() -> str:
    path = files("localign") / "assets" / "explore" / "page.html"
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        raise UserError(
            f"this installation has no front end of explore, {path}; install localign again"
        ) from None


def _inside(template: str, tag: str) -> str:
    found = re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
    assert found is not None, f"the front end has no <{tag}>"
    return found.group(1)


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(content: Mapping[str, Any]) -> str:
    """JSON that ends no script element: browsers look for tags in it before they parse it."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
