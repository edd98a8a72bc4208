"""The demo page and its Ask tab: show pictures, ask questions, set the adapter's strength.

`side_by_side.py` has what a conversation is, `page_parts.py` how it looks, `access.py` what may come to the page,
`page_training.py` the Train tab.
"""

from __future__ import annotations

import logging
import socket
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, no_type_check

import gradio as gr  # pyright: ignore[reportMissingImports] - of the extra `web`
import uvicorn
from fastapi import FastAPI

from dora_vl.core.strength import checked_strength
from dora_vl.errors import UserError
from dora_vl.run.folder import ADAPTER
from dora_vl.serving.access import AccessRules, ByteBudget, PageMiddleware, Uploads
from dora_vl.serving.decoding import Sampling
from dora_vl.serving.engine import NOTHING
from dora_vl.serving.page_parts import column_view, head_view, notice_view, shown_view, state_view
from dora_vl.serving.page_training import TrainTab, Update
from dora_vl.serving.side_by_side import Conversation, ModelChoice, OpenModels, error_text

STYLE = Path(__file__).parent / "page_files" / "page.css"
TAKE_QUESTION, SCRIPT = STYLE.with_name("take_question.js"), STYLE.with_name("page.js")
KEY = "() => [sessionStorage.doraVlTalk ??= crypto.getRandomValues(new Uint32Array(4)).join('-')]"
"""The server keeps a browser tab's conversation under this key while the tab reloads the page."""
FONT, MONOSPACE = ("system-ui", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"), ("ui-monospace", "monospace")
"""The visitor's own system has these fonts: none is fetched."""
STRONGEST, STEP = 2.0, 0.05
"""The strength slider ends at 2; a request may ask for more."""
LONGEST_ANSWER = 1024
MAX_CONVERSATIONS = 64
"""Memory holds at most this many conversations, with their pictures; the least recently used goes first."""


class QuietServer(uvicorn.Server):
    """Closes open pages quietly on shutdown: their event streams never end by themselves."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Shuts the server down without logging errors."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


def build_page_app(page: Page, rules: AccessRules, *, upload_bytes: int) -> FastAPI:
    """Returns the application, which takes no file of more than `upload_bytes`."""
    app = FastAPI(title="dora-vl demo", docs_url=None, redoc_url=None, openapi_url=None)
    budget = ByteBudget(2**20, 64 * 2**20)  # of events, which hold no picture
    app.add_middleware(PageMiddleware, rules=rules, budget=budget, uploads=page.uploads)
    page.blocks.queue(max_size=page.models.settings.waiting, api_open=False)
    page.blocks.state_session_capacity = MAX_CONVERSATIONS
    page.blocks.has_launched = True  # else Gradio takes any file for an uploaded one; its mount leaves that out
    colours = gr.themes.Default(
        primary_hue="blue",
        secondary_hue="blue",
        neutral_hue="slate",
        radius_size="lg",
        font=[gr.themes.Font(name) for name in FONT],
        font_mono=[gr.themes.Font(name) for name in MONOSPACE],
    )
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
        theme=colours.set(body_background_fill="*neutral_50", block_shadow="none"),
        css_paths=[STYLE],
        js=SCRIPT.read_text(encoding="utf-8"),
    )


class Column(NamedTuple):
    """One of the page's two columns: its model, its conversation, and the strength of its adapter."""

    model: gr.Dropdown
    answers: gr.HTML
    strength: gr.Slider

    @classmethod
    def laid_out(cls, side: str) -> Column:
        """Lays the column out in the row being built; `Page.open_page` fills it."""
        with gr.Column(min_width=230):
            return cls(
                gr.Dropdown([], show_label=False, elem_id=f"dv-model-{side}"),
                gr.HTML("", elem_id=f"dv-conversation-{side}"),
                gr.Slider(
                    0, STRONGEST, 1.0, step=STEP, label="Strength of the adapter", visible=False,
                    info="0 the base, 1 the adapter as it was trained", elem_id=f"dv-strength-{side}",
                ),
            )  # fmt: skip


class Page:
    """One page for all who open it; each one's conversation is kept by the key that their browser's tab has.

    No file but visitors' uploads is ever read or deleted.
    """

    def __init__(self, models: OpenModels, uploads: Uploads, *, trains: bool = False) -> None:
        self.models, self.uploads = models, uploads
        self._key_of: dict[str, str] = {}
        """Maps people who have the page open, as Gradio knows them, to the keys of their browsers' tabs."""
        self.training = TrainTab(uploads, models.close, self._key_of) if trains else None
        self._conversations: OrderedDict[str, Conversation] = OrderedDict()
        with gr.Blocks(title="dora-vl demo", analytics_enabled=False, fill_width=True) as self.blocks:
            self.tabs = gr.Tabs(selected="ask" if models.names else "train", elem_id="dv-doors")
            with self.tabs:
                with gr.Tab("Ask", id="ask"):
                    self._lay_out()
                if self.training is not None:
                    with gr.Tab("Train", id="train"):
                        self.training.lay_out()
            self._connect()

    def _lay_out(self) -> None:
        settings = self.models.settings
        self.head = gr.HTML("")
        self.person, self.conversation, self.answered = gr.State(""), gr.State(None), gr.State("")
        self.key, self.asked = gr.Textbox(visible="hidden"), gr.Textbox(visible="hidden")
        with gr.Row(equal_height=False, elem_id="dv-ask-door"):
            with gr.Column(min_width=280, elem_id="dv-shown"):  # what the models are shown
                self.files = gr.File(label="Pictures or a video", file_count="multiple", height=124,
                                     elem_id="dv-files")  # fmt: skip
                self.seen = gr.HTML(shown_view(NOTHING), elem_id="dv-seen")
                self.remove_button = gr.Button(
                    "Remove the pictures", size="sm", variant="secondary", elem_id="dv-nothing"
                )
            with gr.Column(min_width=280, elem_id="dv-answers"):  # who answers, and what is asked and said
                self.notice = gr.HTML(notice_view(""), elem_id="dv-notice")
                with gr.Row(equal_height=False):
                    self.columns = [Column.laid_out(side) for side in ("left", "right")]
                with gr.Row(equal_height=True, elem_id="dv-asking"):
                    self.question = gr.Textbox(placeholder="Type a question, then Enter", show_label=False, scale=8,
                                               container=False, lines=1, autofocus=True,
                                               elem_id="dv-question")  # fmt: skip
                    small: Any = {"scale": 1, "min_width": 80}
                    self.ask_button = gr.Button("Ask", variant="primary", interactive=False, elem_id="dv-ask", **small)
                    self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="dv-stop", **small)
                    self.new_chat_button = gr.Button("New chat", scale=1, min_width=100, elem_id="dv-anew")
            with gr.Column(min_width=280, elem_id="dv-more"), gr.Accordion("Settings", open=False):
                longest = max(LONGEST_ANSWER, settings.max_new_tokens)
                self.tokens = gr.Slider(1, longest, settings.max_new_tokens, step=1,
                                        label="Longest answer, in tokens")  # fmt: skip
                self.temperature_slider = gr.Slider(0, 2, settings.temperature, step=0.1, label="Temperature",
                                      info="0 takes the likeliest token each time")  # fmt: skip
                self.remember = gr.Checkbox(True, label="Later questions see the earlier ones")

    def _connect(self) -> None:
        choices = [*(column.model for column in self.columns), *(column.strength for column in self.columns)]
        chosen = [self.person, self.conversation, *choices, self.tokens, self.temperature_slider, self.remember]
        shown = [self.conversation, self.files, self.seen, self.notice, *(column.answers for column in self.columns)]
        changing = [*shown, self.question, self.answered, self.ask_button, self.stop]
        quick = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
        # always_last: what comes while the page is still about the event before is begun after it, not dropped.
        showing = {**quick, "outputs": changing, "trigger_mode": "always_last"}
        # Only answers go through the queue: its stream is closed after each event, and what an event that begins in
        # the next 100 ms sends is lost, such as the answer to a question that waited for its picture.
        answering = {**showing, "queue": True, "concurrency_id": "answers"}
        answering |= {"concurrency_limit": self.models.settings.batch}
        self.files.upload(self.show_files, [self.person, self.files], **showing)
        self.remove_button.click(partial(self._start_conversation, Conversation()), [self.person], **showing)
        self.new_chat_button.click(self.new_chat, [self.person, self.conversation], **showing)
        taking = gr.on(
            [self.ask_button.click, self.question.submit],
            None,
            [self.question],
            [self.asked, self.question],
            js=TAKE_QUESTION.read_text(encoding="utf-8"),
            **quick,
        )
        taking.then(self.ask, [*chosen, self.asked, self.answered], **answering)
        gr.on([column.strength.release for column in self.columns], self.ask_again, chosen, **answering)
        for column in self.columns:
            switched = column.model.input(self._strength_slider, [column.model], [column.strength], **quick)
            switched.then(self.ask_again, chosen, **answering)
        self.stop.click(self.models.stop, [self.person], **quick)
        tabs = [self.head, *(part for column in self.columns for part in column)]
        begun = [self.person, *shown, self.ask_button, *tabs, self.tabs]
        if (train := self.training) is not None:
            begun += train.parts
            train.ask.click(self.ask_run, [self.person, train.run], begun, **{**quick, "queue": True})
        self.blocks.load(self.open_page, [self.key], begun, js=KEY, **quick)
        self.blocks.unload(self.close_page)

    def open_page(self, key: str, request: gr.Request) -> Update:
        """Opens or reloads the page: returns the session's conversation, and a box for questions."""
        person = str(request.session_hash)
        self._key_of[person] = key
        conversation = self._conversations.get(key, Conversation()).ended()
        training = {} if self.training is None else self.training.opened(key)
        asks = bool(self.models.names) or self.models.reading
        tab = "train" if training and not asks else "ask"
        view = {
            **self._model_choices(),
            **self._start_conversation(conversation, person),
            **training,
            self.tabs: gr.update(selected=tab),
        }
        return {**view, self.person: person, self.ask_button: gr.update(interactive=asks)}

    def ask_run(self, person: str, run: str) -> Iterator[Update]:
        """Opens a run's adapter beside its base; yields the Ask tab with both."""
        assert self.training is not None
        yield {self.training.state: state_view("", "Reading the base …")}
        try:
            folder = self.training.folder_of(run)
            self.models.open({folder.name: folder / ADAPTER})
        except UserError as error:
            yield {self.training.state: state_view("failed", error_text(error))}
            return
        yield {
            **self._model_choices(),
            **self._start_conversation(Conversation(), person),
            self.tabs: gr.update(selected="ask"),
            self.ask_button: gr.update(interactive=True),
            **self.training.follow(run, ""),
        }

    def show_files(self, person: str, paths: list[str] | None) -> Any:
        """Begins a conversation about chosen files, which are read at once and deleted."""
        files = [Path(path) for path in paths or []]
        if not files:
            return gr.skip()
        try:
            if not all(self.uploads.holds(str(file)) for file in files):
                raise UserError("an uploaded file is gone; choose it again")
            return {
                self.files: None,
                **self._start_conversation(Conversation(shown=self.models.side.look(files)), person),
            }
        except UserError as error:
            return {self.files: None, self.notice: notice_view(error_text(error))}
        finally:
            for file in files:
                self.uploads.delete(file)

    def new_chat(self, person: str, conversation: Conversation | None) -> Update:
        """Begins a new conversation about the same pictures."""
        return self._start_conversation(Conversation(shown=conversation.shown if conversation else NOTHING), person)

    @no_type_check  # a wrapper that checks types hides from Gradio that this is a generator
    def ask(self, person: str, conversation: Conversation | None, *chosen: Any) -> Iterator[Update]:
        """Answers a question from its box; `question` has its number before it, and is answered once."""
        *settings, question, answered = chosen
        if question == answered:
            yield gr.skip()
            return
        yield {self.answered: question}
        yield from self._answers(person, conversation, settings, question.partition(" ")[2])

    @no_type_check  # as above
    def ask_again(self, person: str, conversation: Conversation | None, *chosen: Any) -> Iterator[Update]:
        """Asks the models chosen now the last question again, unless just these answered it."""
        yield from self._answers(person, conversation, chosen, None)

    def close_page(self, request: gr.Request) -> None:
        """Stops the answers for a page that was closed."""
        self.models.stop(str(request.session_hash))
        self._key_of.pop(str(request.session_hash), None)

    def _model_choices(self) -> Update:
        """Returns the Ask tab's parts for the models that answer now: the first adapter beside the base."""
        names = self.models.names
        update: Update = {self.head: head_view(names, self.models.side.engine.model.source.base if names else "")}
        for column, name in zip(self.columns, names[1:2] + names[:1], strict=False):
            update |= {
                column.model: gr.update(choices=list(names), value=name),
                column.strength: self._strength_slider(name),
            }
        return update

    def _strength_slider(self, model: str) -> Any:
        return gr.update(visible=model != self.models.names[0], value=1.0)  # the base has no strength to choose

    def _start_conversation(self, conversation: Conversation, person: str) -> Update:
        self.models.stop(person)
        self._keep(person, conversation)
        return {
            self.conversation: conversation,
            self.seen: shown_view(
                conversation.shown, frames_are_pictures=bool(self.models.names) and self.models.side.frames_are_pictures
            ),
            self.notice: notice_view(""),
            **self._views(conversation),
        }

    def _keep(self, person: str, conversation: Conversation) -> None:
        """Keeps a conversation for when its browser tab is reloaded."""
        if key := self._key_of.get(person):
            self._conversations[key] = conversation
            self._conversations.move_to_end(key)
            while len(self._conversations) > MAX_CONVERSATIONS:
                self._conversations.popitem(last=False)

    def _answers(
        self, person: str, conversation: Conversation | None, chosen: Sequence[Any], question: str | None
    ) -> Iterator[Update]:
        """Yields the conversation as it grows by the answers to a question.

        Args:
            conversation: None where Gradio has let go of it.
            chosen: models, strengths, tokens, temperature and whether earlier questions are seen.
            question: what was typed, which goes back into its box where it cannot be asked; None: the last one again.
        """
        *_, tokens, temperature, remember = chosen
        refilled: Update = {} if question is None else {self.question: question}
        try:
            if conversation is None or not person:
                raise UserError("this chat is no longer here; load the page again")
            side, names = self.models.side, self.models.names
            if not {*chosen[:2]} <= {*names}:
                yield self._model_choices()
                raise UserError(f"another run was opened: {' and '.join(names)} answer now; ask again")
            base = names[0]  # it has no strength
            choices = [
                ModelChoice(name=name, strength=1.0 if name == base else checked_strength(strength))
                for name, strength in zip(chosen[:2], chosen[2:4], strict=True)
            ]
            if question is None:
                last = conversation.exchanges[-1:]
                if not last or choices == [answer.choice for answer in last[0].answers]:
                    yield gr.skip()  # a generator without anything would empty all parts
                    return
                conversation, question = replace(conversation, exchanges=conversation.exchanges[:-1]), last[0].question
            if tokens is None or temperature is None:
                raise UserError("the settings lack a number; type one")
            sampling = Sampling(max_new_tokens=max(1, int(tokens)), temperature=float(temperature))
            remembered = conversation if remember else replace(conversation, exchanges=())
            yield {self.ask_button: gr.update(interactive=False), self.stop: gr.update(interactive=True)}
            for answered in side.ask(person, remembered, question, choices, sampling):
                grown = replace(conversation, exchanges=(*conversation.exchanges, answered.exchanges[-1]))
                self._keep(person, grown)
                yield {self.conversation: grown, self.notice: notice_view(""), **self._views(grown)}
        except UserError as error:
            yield {self.notice: notice_view(error_text(error)), **refilled}
        yield {self.ask_button: gr.update(interactive=True), self.stop: gr.update(interactive=False)}

    def _views(self, conversation: Conversation) -> Update:
        names = self.models.names
        return {
            column.answers: column_view(conversation, number, named=name)
            for number, (column, name) in enumerate(zip(self.columns, names[1:2] + names[:1] or ("", ""), strict=True))
        }
