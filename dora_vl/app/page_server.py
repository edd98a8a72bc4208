"""The page over HTTP: Gradio's application, kept from asking anybody else, and from leaving anything behind."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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


def serve_page(app: FastAPI, door: socket.socket) -> None:
    """Serves until somebody ends it."""
    QuietServer(uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=1)).run(
        sockets=[door]
    )


class QuietServer(uvicorn.Server):
    """Cuts open pages off when it ends: they listen for ever, and that they are cut off is no error."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends it, in silence."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


def build_page_app(page: Any, *, upload_bytes: int, waiting: int) -> FastAPI:
    """The application.

    Args:
        page: a `Page`.
        upload_bytes: largest file that is taken at all.
        waiting: most questions that wait for their turn.
    """
    import gradio as gr  # pyright: ignore[reportMissingImports] - of the extra `web`

    from dora_vl.app.page_parts import STYLE, theme

    app = FastAPI(title="dora-vl demo", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(OwnHostAlone)
    page.blocks.queue(max_size=waiting, api_open=False)
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
    )
