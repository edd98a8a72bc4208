"""What happens on the page: pictures are shown, questions asked, a dial turned. Each is one call here.

What a talk is stands in `side_by_side.py`, how it looks and the page's parts in `page_parts.py`. Gradio has many more
addresses than the page needs: some give files, fetch from the web or run other programs. Here only those are there that
the page itself asks for, and a file that a request names must be one that was uploaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, no_type_check

import gradio as gr  # pyright: ignore[reportMissingImports] - of the extra `web`
import uvicorn
from anyio.to_thread import run_sync
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dora_vl.core.strength import checked_strength
from dora_vl.errors import UserError
from dora_vl.evaluation.ask import Shown
from dora_vl.serving.answering import TooManyRequests
from dora_vl.serving.decoding import Sampling
from dora_vl.serving.door import Door
from dora_vl.serving.options import Admission, Refused
from dora_vl.serving.page_parts import (
    DIAL,
    STYLE,
    TAKE_QUESTION,
    ExampleQuestion,
    Talks,
    column_view,
    lay_out,
    notice_view,
    shown_view,
    theme,
)
from dora_vl.serving.side_by_side import NOTHING, SideBySide, Speaker, Talk, plain

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
LARGEST_EVENT, EVENTS_AT_ONCE = 2**20, 64
"""Bytes of what the page says to its program, pictures being uploaded; and so many times that may be on its way."""
BODY_SECONDS = 300.0
FORGET_SECONDS, LOOK_SECONDS = BODY_SECONDS + 60, 20.0
"""How old uploads are that go unread, older than those that come with them; and how often that is looked for."""
MOST_UPLOADS = 1000
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "object-src 'none'; frame-ancestors 'self'"
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
        """Meanwhile an upload is on its way."""
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
                status = file.lstat()
                if status.st_mtime >= oldest:
                    sizes.append(status.st_size)
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


class OwnAlone:
    """Lets through what the page asks for, where it names no file but uploaded ones; `POLICY` is on every answer."""

    def __init__(self, app: ASGIApp, uploads: Uploads) -> None:
        self._app = app
        self._uploads = uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request. Raises UserError: it is refused."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        addresses = ADDRESSES.get(scope["method"])
        if addresses is None or not addresses.fullmatch(scope["path"]):
            raise Refused("the page has no such address")

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        if scope["path"] == UPLOAD:
            with self._uploads.coming(Headers(scope=scope).get("content-length", "")):
                await self._app(scope, receive, with_policy)
            return
        if scope["method"] == "POST":
            self._check_files(scope["content"])
        await self._app(scope, receive, with_policy)

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


class QuietServer(uvicorn.Server):
    """Cuts open pages off when it ends: they listen for ever, and that they are cut off is no error."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends it, in silence."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


def build_page_app(page: Any, admission: Admission, *, upload_bytes: int, waiting: int) -> FastAPI:
    """The application.

    Args:
        upload_bytes: largest file that is taken at all.
    """
    app = FastAPI(
        title="dora-vl demo", docs_url=None, redoc_url=None, openapi_url=None, lifespan=page.uploads.forgetting
    )
    app.add_middleware(OwnAlone, uploads=page.uploads)
    limits = {"largest": LARGEST_EVENT, "at_once": EVENTS_AT_ONCE, "streamed": (UPLOAD,)}
    app.add_middleware(Door, admission=admission, body_seconds=BODY_SECONDS, **limits)
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


Update = dict[Any, Any]
"""New values by part; parts that are not named stay."""


class Page:
    """One page for all who open it.

    Args:
        uploads: what visitors have sent; no other file is ever read or deleted.
        examples: questions that a click takes.
        new_tokens: longest answer, where nobody chooses another; so with `temperature`.
    """

    def __init__(
        self,
        side: SideBySide,
        uploads: Uploads,
        examples: Sequence[ExampleQuestion] = (),
        *,
        new_tokens: int = 256,
        temperature: float = 0.0,
    ) -> None:
        self.side, self.uploads, self.examples = side, uploads, tuple(examples)
        self.talks = Talks()
        model = side.engine.model
        self._base = model.base_name
        base = Path(model.source.base).name
        self.blocks, self.parts = lay_out(
            model.names, base, self.examples, new_tokens=new_tokens, temperature=temperature
        )
        with self.blocks:
            self._connect()

    def _connect(self) -> None:
        parts = self.parts
        quick = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
        # always_last: what comes while the page is still about the event before is begun after it, not dropped.
        showing = {**quick, "outputs": parts.changing, "trigger_mode": "always_last"}
        # Answers alone go through the queue: its stream is closed after each event, and what an event that begins in
        # the next 100 ms sends is lost, such as the answer to a question that waited for its picture.
        answering = {**showing, "queue": True, "concurrency_id": "answers"}
        answering |= {"concurrency_limit": self.side.engine.settings.batch_rows}
        parts.files.upload(self.show_files, [parts.person, parts.files], **showing)
        parts.webcam.input(self.show_files, [parts.person, parts.webcam], **showing)
        parts.nothing.click(self.show_nothing, [parts.person], **showing)
        parts.anew.click(self.begin_anew, [parts.person, parts.key], **showing)
        if parts.examples is not None:
            parts.examples.click(self.take_example, [parts.person, parts.examples], **showing)
        asked, taken = [parts.ask.click, parts.question.submit], [parts.asked, parts.question]
        taking = gr.on(asked, None, [parts.question], taken, js=TAKE_QUESTION.read_text(encoding="utf-8"), **quick)
        taking.then(self.ask, [*parts.chosen, parts.asked, parts.answered], **answering)
        again = [column.strength.release for column in parts.columns]
        gr.on(again, self.ask_again, parts.chosen, **answering)
        for column in parts.columns:
            chosen = column.model.input(self._dial_of, [column.model], [column.strength], **quick)
            chosen.then(self.ask_again, parts.chosen, **answering)
        parts.stop.click(self.side.stop, [parts.person], **quick)
        self.blocks.load(_begin, None, [parts.person, parts.ask], **quick)
        self.blocks.unload(self.leave)

    # -- what a person does ------------------------------------------------------------------------------------

    def show_files(self, person: str, paths: list[str] | str | None) -> Any:
        """Files were chosen: they are read at once and deleted, and a talk about them begins."""
        files = [Path(path) for path in ([paths] if isinstance(paths, str) else paths or [])]
        if not files:
            return gr.skip()
        emptied = {self.parts.files: None, self.parts.webcam: None}
        try:
            if not all(self.uploads.holds(str(file)) for file in files):
                raise UserError("a file is here no longer; choose it again")
            return {**emptied, **self._begun(Talk(shown=self.side.look(files)), person)}
        except UserError as error:
            return {**emptied, self.parts.notice: notice_view(plain(error))}
        finally:
            for file in files:
                self.uploads.delete(file)

    def show_nothing(self, person: str) -> Update:
        """The pictures go, and the talk with them."""
        return self._begun(Talk(), person)

    def begin_anew(self, person: str, key: str) -> Update:
        """The same pictures, and nothing said about them yet."""
        shown = NOTHING
        with contextlib.suppress(UserError):
            shown = self.talks.get(key).shown
        return self._begun(Talk(shown=shown), person)

    def take_example(self, person: str, number: int) -> Update:
        """An example was clicked: its picture is shown, its question typed."""
        example = self.examples[number]
        begun = self._begun(Talk(shown=Shown(pictures=(example.picture,))), person)
        return {**begun, self.parts.question: example.question}

    @no_type_check  # a wrapper that checks types hides from Gradio that this is a generator
    def ask(self, person: str, key: str, *chosen: Any) -> Iterator[Update]:
        """A question was taken from its box; `asked` has its number before it, and is answered once."""
        *settings, asked, answered = chosen
        if asked == answered:
            yield gr.skip()
            return
        yield {self.parts.answered: asked}
        yield from self._answers(person, key, settings, asked.partition(" ")[2])

    @no_type_check  # likewise
    def ask_again(self, person: str, key: str, *chosen: Any) -> Iterator[Update]:
        """The last question once more, to the models as they are chosen now; nothing where just these were asked it."""
        yield from self._answers(person, key, chosen, None)

    def leave(self, request: gr.Request) -> None:
        """The page was closed: nobody waits for an answer any more."""
        self.side.stop(str(request.session_hash))

    # -- inside ------------------------------------------------------------------------------------------------

    def _dial_of(self, model: str) -> Any:
        return gr.update(interactive=model != self._base)  # the base has no strength to choose

    def _begun(self, talk: Talk, person: str) -> Update:
        self.side.stop(person)
        parts = self.parts
        return {
            parts.key: self.talks.begin(talk),
            parts.seen: shown_view(talk.shown, frames_are_pictures=self.side.frames_are_pictures),
            parts.notice: notice_view(""),
            **self._columns(talk),
        }

    def _answers(self, person: str, key: str, chosen: Sequence[Any], question: str | None) -> Iterator[Update]:
        """The talk as it grows by the answers to a question.

        Args:
            chosen: as `parts.chosen` has them, behind the key.
            question: what was typed, which goes back into its box where it cannot be asked; None: the last one again.
        """
        parts = self.parts
        *_, tokens, temperature, remember = chosen
        again: Update = {} if question is None else {parts.question: question}
        try:
            talk = self.talks.get(key)
            # The base has no strength.
            speakers = [
                Speaker(name=name, strength=1.0 if name == self._base else checked_strength(strength))
                for name, strength in zip(chosen[:2], chosen[2:4], strict=True)
            ]
            if question is None:
                last = talk.exchanges[-1:]
                if not last or speakers == [answer.speaker for answer in last[0].answers]:
                    yield gr.skip()  # a generator without anything would empty all parts
                    return
                talk, question = replace(talk, exchanges=talk.exchanges[:-1]), last[0].question
            if tokens is None or temperature is None:
                raise UserError("the settings lack a number; type one")
            sampling = Sampling(max_new_tokens=max(1, int(tokens)), temperature=float(temperature))
            key = key or self.talks.begin(talk)
            remembered = talk if remember else replace(talk, exchanges=())
            yield {parts.ask: gr.update(interactive=False), parts.stop: gr.update(interactive=True)}
            for answered in self.side.ask(person, remembered, question, speakers, sampling):
                grown = replace(talk, exchanges=(*talk.exchanges, answered.exchanges[-1]))
                self.talks.keep(key, grown)
                yield {parts.key: key, parts.notice: notice_view(""), **self._columns(grown)}
        except UserError as error:
            yield {parts.notice: notice_view(plain(error)), **again}
        yield {parts.ask: gr.update(interactive=True), parts.stop: gr.update(interactive=False)}

    def _columns(self, talk: Talk) -> Update:
        names = (next(iter(self.side.engine.model.names[1:]), self._base), self._base)
        return {
            part.talk: column_view(talk, number, named=name)
            for number, (part, name) in enumerate(zip(self.parts.columns, names, strict=True))
        }


def _begin(request: gr.Request) -> tuple[str, Any]:
    """The page is ready, and a person has it open, as Gradio knows them: questions are taken from now on."""
    return str(request.session_hash), gr.update(interactive=True)
