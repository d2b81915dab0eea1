"""The web page: a few static files, read once, with a content policy that lets nothing else run."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

__all__ = ["page_routes"]

_FILES: Final = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "api.js": "text/javascript; charset=utf-8",
    "chat.js": "text/javascript; charset=utf-8",
    "ideas.js": "text/javascript; charset=utf-8",
    "markdown.js": "text/javascript; charset=utf-8",
    "store.js": "text/javascript; charset=utf-8",
    "view.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "sample.png": "image/png",
}

_HEADERS: Final = {
    # Whatever a model writes, the page loads and runs only its own files.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page_routes() -> list[Route]:
    """`/` and the files it needs under `/page/`."""
    folder = files("client.gateway") / "static"
    routes = []
    for name, media_type in _FILES.items():
        data = (folder / name).read_bytes()
        path = "/" if name == "index.html" else f"/page/{name}"
        routes.append(Route(path, _File(data, media_type).answer, methods=["GET"]))
    return routes


class _File:
    """One file with its entity tag, so that a reload costs nothing."""

    def __init__(self, data: bytes, media_type: str) -> None:
        self._data = data
        tag = f'"{hashlib.sha256(data).hexdigest()[:20]}"'
        self._headers = {**_HEADERS, "content-type": media_type, "etag": tag}

    async def answer(self, request: Request) -> Response:
        """The file, or 304 if the browser has it."""
        if request.headers.get("if-none-match") == self._headers["etag"]:
            return Response(None, 304, self._headers)
        return Response(self._data, 200, self._headers)
