"""`localign explore --serve`: pages of photographs that a visitor uploads, on this machine."""

from __future__ import annotations

import asyncio
import hashlib
import html
import socket
from base64 import b64encode
from collections.abc import AsyncIterator, Mapping
from typing import Any

import torch

from localign.backbones import Backbone
from localign.data.decoding import decode_image
from localign.data.sources import UnreadableImage
from localign.engine.log import say
from localign.errors import UserError
from localign.explore.content import Alignment, assemble
from localign.explore.images import MIB, ImageCollector, check_size
from localign.options.export import ExploreConfig
from localign.text.printing import first_line, printable

MAX_UPLOAD = 64 * MIB
"""Bytes of one upload, all photographs together."""
MAX_PHOTOGRAPHS = 12
"""Photographs of one upload."""
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
_STYLE = (
    ":root { color-scheme: light dark } body { font: 17px/1.5 system-ui, sans-serif; max-width: 36rem; "
    "margin: 12vh auto; padding: 0 20px } input, button { font: inherit; margin: 8px 0; max-width: 100% } "
    "button { padding: 6px 18px } [role=alert] { border-left: 4px solid #c24f00; padding-left: 12px }"
)
_POLICY = (
    f"default-src 'none'; style-src 'sha256-{b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


class UploadTooLarge(Exception):
    """An upload is above :data:`MAX_UPLOAD`."""


def application(
    config: ExploreConfig,
    models: Mapping[str, Backbone],
    alignment: Alignment | None,
    device: torch.device,
    hosts: list[str],
) -> Any:
    """The web application (ASGI).

    ``GET /`` has a form; ``POST /`` takes its photographs and answers with their page. One page is made at a time.

    Args:
        config: The options.
        models: By name.
        alignment: For masked views.
        device: Device to compute on.
        hosts: Names under which browsers may reach the server. Others are refused, so that no foreign web page can
            reach a server on this machine by a name of its own.

    Raises:
        UserError: The extra ``localign[serve]`` is not installed.
    """
    try:
        import python_multipart  # noqa: F401  # starlette imports it at the first upload
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.requests import Request
        from starlette.responses import HTMLResponse
        from starlette.routing import Route
    except ImportError:
        raise UserError(_MISSING) from None

    one_at_a_time = asyncio.Lock()

    async def form(request: Request) -> HTMLResponse:
        return HTMLResponse(_form(models), headers=_headers())

    async def upload(request: Request) -> HTMLResponse:
        origin = request.headers.get("origin")
        if origin is not None and origin != f"{request.url.scheme}://{request.headers.get('host')}":
            return HTMLResponse(_form(models, "Uploads from other web pages are refused."), 403, _headers())
        try:
            photographs = await _photographs(request)
            async with one_at_a_time:
                page = await asyncio.to_thread(_page, config, models, alignment, device, photographs)
        except UploadTooLarge:
            most = f"At most {MAX_PHOTOGRAPHS} photographs and {MAX_UPLOAD // MIB} MiB at once."
            return HTMLResponse(_form(models, most), 413, _headers())
        except (UserError, UnreadableImage) as error:
            return HTMLResponse(_form(models, first_line(error)), 400, _headers())
        return HTMLResponse(page, headers={"Cache-Control": "no-store"})

    routes = [Route("/", form, methods=["GET"]), Route("/", upload, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)])


_MISSING = "explore --serve requires starlette and uvicorn: pip install 'localign[serve]'"


async def _photographs(request: Any) -> list[tuple[str, bytes]]:
    """Names and contents of the uploaded files; reading stops at the bounds."""
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser

    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise UserError("Choose a photograph first.")

    async def bounded() -> AsyncIterator[bytes]:
        received = 0
        async for chunk in request.stream():
            received += len(chunk)
            if received > MAX_UPLOAD:
                raise UploadTooLarge
            yield chunk

    try:
        parser = MultiPartParser(request.headers, bounded(), max_files=MAX_PHOTOGRAPHS, max_fields=1)
        fields = await parser.parse()
    except (MultiPartException, ValueError) as error:  # the parser's own errors are ValueErrors
        if "Too many" in str(getattr(error, "message", "")):
            raise UploadTooLarge from None
        raise UserError("The upload cannot be read.") from None
    files = [field for _, field in fields.multi_items() if isinstance(field, UploadFile)]
    found = [(file.filename or "photograph", await file.read()) for file in files]
    await fields.close()
    found = [(name, content) for name, content in found if content]
    if not found:
        raise UserError("Choose a photograph first.")
    return found


def _page(
    config: ExploreConfig,
    models: Mapping[str, Backbone],
    alignment: Alignment | None,
    device: torch.device,
    photographs: list[tuple[str, bytes]],
) -> str:
    check_size(config, models, len(photographs))
    images = ImageCollector(models)
    for name, content in photographs:
        images.add(name, decode_image(content, printable(name)))
    page, facts = assemble(config, models, images.shown(), device, alignment=alignment, home="/")
    say(f"page       {len(page.encode()) / MIB:.1f} MiB ({facts})")
    return page


def _headers() -> dict[str, str]:
    return {
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }


def _form(models: Mapping[str, Backbone], problem: str = "") -> str:
    names = html.escape(", ".join(map(printable, models)))
    alert = f'<p role="alert">{html.escape(problem)}</p>' if problem else ""
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>localign explore</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><h1>What {names} see in each patch</h1>{alert}"
        '<form method="post" enctype="multipart/form-data"><p><label for="files">Photographs of yours, which stay on '
        "the machine that runs this server:</label></p>"
        '<p><input id="files" name="files" type="file" accept="image/*" multiple required></p>'
        "<p><button>Show</button></p></form></body></html>"
    )


def serve(
    config: ExploreConfig,
    models: Mapping[str, Backbone],
    alignment: Alignment | None,
    device: torch.device,
) -> None:
    """Serve until interrupted.

    Raises:
        UserError: The extra is not installed, or the address cannot be served.
    """
    try:
        import uvicorn
    except ImportError:
        raise UserError(_MISSING) from None
    is_local = config.host in _LOOPBACK
    app = application(config, models, alignment, device, list(_LOOPBACK) if is_local else ["*"])
    listener = _listener(config)
    port = listener.getsockname()[1]
    shown = f"[{config.host}]" if ":" in config.host else config.host
    if not is_local:
        say(f"everybody who can reach {config.host} can upload photographs to this process")
    print(f"explore    http://{shown}:{port}/ (stop with Ctrl-C)", flush=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", limit_concurrency=32, access_log=False))
    server.run(sockets=[listener])


def _listener(config: ExploreConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(
            f"cannot serve at {printable(config.host)}, port {config.port}: {first_line(error)}; give another --port"
        ) from None
    return listener
