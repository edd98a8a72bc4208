"""The page over HTTP: Gradio's application, kept from asking anybody else, and from giving or keeping any file.

Gradio has many more addresses than the page needs: some give files, fetch from the web or run other programs. Here only
those are there that the page itself asks for, and a file that a request names must be one that was uploaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from anyio.to_thread import run_sync
from fastapi import FastAPI, Request
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dora_vl.app.answering import TooManyRequests
from dora_vl.app.door import Admission, Door, http_config
from dora_vl.app.http_errors import Refused
from dora_vl.app.request_body import Intake, check_json

UPLOAD = "/gradio_api/upload"
ADDRESSES = {
    "GET": re.compile(
        r"/|/(config|theme\.css|favicon\.ico|manifest\.json)|/(assets|static|svelte)/.+"
        r"|/gradio_api/(queue/data|upload_progress|startup-events|heartbeat/\w+)"
    ),
    "HEAD": re.compile("/"),
    "POST": re.compile(rf"{UPLOAD}|/gradio_api/(queue/join|run/predict|cancel|reset)"),
}
"""What the page asks for, by method."""
LARGEST_EVENT = 2**20
"""Bytes of what the page says to its program; pictures are uploaded."""
SENT_AT_ONCE = 64
BODY_SECONDS = 300.0
FORGET_SECONDS, LOOK_SECONDS = BODY_SECONDS + 60, 20.0
"""How old uploads are that go unread, older than those that come with them; and how often that is looked for."""
MOST_UPLOADS = 1000
OWN = "'self'"
POLICY = "; ".join(
    f"{what} {' '.join(sources)}"
    for what, sources in {
        "default-src": (OWN,),
        "script-src": (OWN, "'unsafe-inline'", "'unsafe-eval'"),
        "style-src": (OWN, "'unsafe-inline'"),
        "img-src": (OWN, "data:", "blob:"),
        "media-src": (OWN, "data:", "blob:"),
        "font-src": (OWN, "data:"),
        "worker-src": (OWN, "blob:"),
        "object-src": ("'none'",),
        "frame-ancestors": (OWN,),
    }.items()
)
"""A visitor's browser loads nothing from another host, whatever a page of Gradio's asks for."""


class Uploads:
    """What visitors have sent and the page has not read yet: so many files and bytes at most, and not for long.

    Args:
        folder: Gradio keeps them here, each in a folder of its own.
        most_bytes: of all of them.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder = folder.resolve()
        self._most_bytes = most_bytes
        self._coming = 0

    def holds(self, path: str) -> bool:
        """Whether a path is a file that was uploaded."""
        try:
            file = Path(path).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            return False
        return file.is_file() and file.parent.parent == self.folder

    def delete(self, file: Path) -> None:
        """Deletes an uploaded file, and nothing else."""
        if self.holds(str(file)):
            self._remove(file)

    @contextlib.contextmanager
    def coming(self, size: str) -> Iterator[None]:
        """Meanwhile an upload is on its way.

        Args:
            size: its bytes, as its header says.

        Raises:
            Refused: it does not say.
            TooManyRequests: there is no room for it.
        """
        if not size.isdecimal():
            raise Refused("an upload must say its size (Content-Length)")
        sizes = self.forget()
        if len(sizes) >= MOST_UPLOADS or sum(sizes) + self._coming + int(size) > self._most_bytes:
            raise TooManyRequests("too much is being uploaded; try again in a few minutes")
        self._coming += int(size)
        try:
            yield
        finally:
            self._coming -= int(size)

    def forget(self) -> list[int]:
        """Deletes what is too old; the sizes of the files that are left."""
        sizes, oldest = [], time.time() - FORGET_SECONDS
        for file in [path for path in self.folder.rglob("*") if not path.is_dir()]:
            with contextlib.suppress(FileNotFoundError):  # it was read just now
                seen = file.lstat()
                if seen.st_mtime >= oldest:
                    sizes.append(seen.st_size)
                else:
                    self._remove(file)
        return sizes

    def _remove(self, file: Path) -> None:
        """A file, and its folder where nothing else is in it, such as the same content under another name."""
        with contextlib.suppress(OSError):
            file.unlink()
            if file.parent != self.folder:
                file.parent.rmdir()

    @contextlib.asynccontextmanager
    async def forgetting(self, _: FastAPI) -> AsyncIterator[None]:
        """Meanwhile old uploads are deleted again and again."""

        async def again() -> None:
            while True:
                await asyncio.sleep(LOOK_SECONDS)
                await run_sync(self.forget)

        task = asyncio.create_task(again())
        try:
            yield
        finally:
            task.cancel()


class OwnFilesAlone:
    """Lets through what the page asks for, where it names no file but uploaded ones."""

    def __init__(self, app: ASGIApp, uploads: Uploads) -> None:
        self._app = app
        self._uploads = uploads
        self._intake = Intake(LARGEST_EVENT, SENT_AT_ONCE * LARGEST_EVENT)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request.

        Raises:
            UserError: it is refused.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        addresses, request = ADDRESSES.get(scope["method"]), Request(scope, receive)
        if addresses is None or not addresses.fullmatch(scope["path"]):
            raise Refused("the page has no such address")
        if scope["path"] == UPLOAD:
            with self._uploads.coming(request.headers.get("content-length", "")):
                await self._app(scope, receive, send)
        elif scope["method"] == "POST":
            check_json(request)
            content = await self._intake.content(request)
            self._check_files(content)
            await self._app(scope, _said_again(content, receive), send)
        else:
            await self._app(scope, receive, send)

    def _check_files(self, content: bytes) -> None:
        try:
            values = [json.loads(content)]
        except (ValueError, RecursionError):
            raise Refused("the request is no JSON") from None
        while values:
            value = values.pop()
            if isinstance(value, dict):
                if "path" in value and not (isinstance(value["path"], str) and self._uploads.holds(value["path"])):
                    raise Refused("the request names a file that was not uploaded, or is here no longer")
                values += value.values()
            elif isinstance(value, list):
                values += value


def _said_again(content: bytes, receive: Receive) -> Receive:
    """The messages of a request whose content was read already."""
    left = [{"type": "http.request", "body": content, "more_body": False}]

    async def next_message() -> Message:
        return left.pop() if left else await receive()

    return next_message


class OwnHostAlone:
    """Puts `POLICY` on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        await self._app(scope, receive, with_policy if scope["type"] == "http" else send)


def keep_gradio_quiet(uploads: Path) -> None:
    """Tells Gradio, before it is imported, where uploads go, and to report to nobody."""
    os.environ |= {
        "GRADIO_TEMP_DIR": str(uploads),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_SSR_MODE": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def serve_page(app: FastAPI, listener: socket.socket) -> None:
    """Serves until somebody ends it."""
    QuietServer(http_config(app, lifespan="on", timeout_graceful_shutdown=1)).run(sockets=[listener])


class QuietServer(uvicorn.Server):
    """Cuts open pages off when it ends: they listen for ever, and that they are cut off is no error."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends it, in silence."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


def build_page_app(page: Any, admission: Admission, *, upload_bytes: int, waiting: int) -> FastAPI:
    """The application.

    Args:
        page: a `Page`.
        admission: who may open it.
        upload_bytes: largest file that is taken at all.
        waiting: most questions that wait for their turn.
    """
    import gradio as gr  # pyright: ignore[reportMissingImports] - of the extra `web`

    from dora_vl.app.page_parts import DIAL, STYLE, theme

    app = FastAPI(
        title="dora-vl demo", docs_url=None, redoc_url=None, openapi_url=None, lifespan=page.uploads.forgetting
    )
    app.add_middleware(OwnFilesAlone, uploads=page.uploads)
    app.add_middleware(OwnHostAlone)
    app.add_middleware(Door, admission=admission, body_seconds=BODY_SECONDS)
    page.blocks.queue(max_size=waiting, api_open=False)
    page.blocks.has_launched = True  # else Gradio takes any file for an uploaded one; its mount leaves that out
    return gr.mount_gradio_app(
        app,
        page.blocks,
        "/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=upload_bytes,
        ssr_mode=False,
        mcp_server=False,
        theme=theme(),
        css_paths=[STYLE],
        js=DIAL.read_text(encoding="utf-8"),
    )
