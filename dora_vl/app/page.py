"""What happens on the page: pictures are shown, questions asked, a dial turned. Each is one call here.

What a talk is stands in `side_by_side.py`, how it looks in `page_view.py`, the page's parts in `page_parts.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, no_type_check

import gradio as gr  # pyright: ignore[reportMissingImports] - of the extra `web`

from dora_vl.app.example_questions import ExampleQuestion
from dora_vl.app.page_parts import TAKE_QUESTION, Column, Start, lay_out
from dora_vl.app.page_server import Uploads
from dora_vl.app.page_view import column_view, notice_view, shown_view
from dora_vl.app.row_decoding import Sampling
from dora_vl.app.side_by_side import NOTHING, SideBySide, Speaker, Talk, plain
from dora_vl.app.talks import Talks
from dora_vl.core.strength import checked_strength
from dora_vl.errors import UserError
from dora_vl.evaluation.asker import Shown

Update = dict[Any, Any]
"""New values by part; parts that are not named stay."""


@dataclass(frozen=True, kw_only=True)
class PageSettings:
    """How the page is set up.

    Attributes:
        uploads: what visitors have sent; no other file is ever read or deleted.
        new_tokens: longest answer, where nobody chooses another.
        temperature: likewise; 0 takes the likeliest token.
    """

    uploads: Uploads
    new_tokens: int = 256
    temperature: float = 0.0


class Page:
    """One page for all who open it.

    Args:
        side: what answers.
        settings: how it is set up.
        examples: questions that a click takes.
    """

    def __init__(self, side: SideBySide, settings: PageSettings, examples: Sequence[ExampleQuestion] = ()) -> None:
        self.side = side
        self.examples = tuple(examples)
        self.talks = Talks()
        self.uploads = settings.uploads
        self._base = side.engine.model.base_name
        start = Start(
            models=side.engine.model.names,
            place=Path(side.engine.model.source.place).name,
            new_tokens=settings.new_tokens,
            temperature=settings.temperature,
            examples=self.examples,
        )
        self.blocks, self.parts = lay_out(start)
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
            column.model.input(self._has_dial, [column.model], [column.strength], **quick).then(
                self.ask_again, parts.chosen, **answering
            )
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
        try:
            shown = self.talks.get(key).shown
        except UserError:
            shown = NOTHING
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
        question = asked.partition(" ")[2]
        yield from self._answers(person, key, settings, lambda talk: (talk, question), typed=question)

    @no_type_check  # likewise
    def ask_again(self, person: str, key: str, *chosen: Any) -> Iterator[Update]:
        """The last question once more, to the models as they are chosen now; nothing where just these were asked it."""
        try:
            last = self.talks.get(key).exchanges[-1:]
        except UserError:
            last = ()
        if not last:
            yield gr.skip()  # a generator without anything would empty all parts
            return
        before = [answer.speaker for answer in last[0].answers]
        yield from self._answers(
            person, key, chosen, lambda talk: (talk.without_last(), talk.exchanges[-1].question), before=before
        )

    def leave(self, request: gr.Request) -> None:
        """The page was closed: nobody waits for an answer any more."""
        self.side.stop(_person(request))

    # -- inside ------------------------------------------------------------------------------------------------

    def _has_dial(self, model: str) -> Any:
        """The base has no strength to choose."""
        return gr.update(interactive=model != self._base)

    def _begun(self, talk: Talk, person: str) -> Update:
        self.side.stop(person)
        parts = self.parts
        shown = {
            parts.seen: shown_view(talk.shown, frames_are_pictures=self.side.frames_are_pictures),
            parts.notice: notice_view(""),
        }
        return {parts.key: self.talks.begin(talk), **shown, **self._columns(talk)}

    def _answers(
        self,
        person: str,
        key: str,
        chosen: Sequence[Any],
        which: Callable[[Talk], tuple[Talk, str]],
        *,
        typed: str = "",
        before: Sequence[Speaker] = (),
    ) -> Iterator[Update]:
        """The talk as it grows by the answers to a question.

        Args:
            chosen: as `Parts.chosen` has them, behind the key.
            which: the talk so far, and the question.
            typed: what goes back into the box where it cannot be asked.
            before: who has answered it; the same are not asked again.
        """
        parts = self.parts
        *_, tokens, temperature, remember = chosen
        try:
            speakers = self._speakers(chosen)
            if speakers == before:
                yield gr.skip()
                return
            sampling = _sampling(tokens, temperature)
            talk, question = which(self.talks.get(key))
            key = key or self.talks.begin(talk)
            told = talk if remember else replace(talk, exchanges=())
            yield {parts.ask: gr.update(interactive=False), parts.stop: gr.update(interactive=True)}
            for answered in self.side.ask(person, told, question, speakers, sampling):
                whole = replace(talk, exchanges=(*talk.exchanges, answered.exchanges[-1]))
                self.talks.keep(key, whole)
                yield {parts.key: key, parts.notice: notice_view(""), **self._columns(whole)}
        except UserError as error:
            yield {parts.notice: notice_view(plain(error)), **({parts.question: typed} if typed else {})}
        yield {parts.ask: gr.update(interactive=True), parts.stop: gr.update(interactive=False)}

    def _speakers(self, chosen: Sequence[Any]) -> list[Speaker]:
        """Who is asked, one a column; the base has no strength.

        Raises:
            UserError: a strength is none.
        """
        count = len(self.parts.columns)
        both = zip(chosen[:count], chosen[count : 2 * count], strict=True)
        return [
            Speaker(name=name, strength=1.0 if name == self._base else checked_strength(strength))
            for name, strength in both
        ]

    def _columns(self, talk: Talk) -> Update:
        names = (next(iter(self.side.engine.model.names[1:]), self._base), self._base)
        parts: tuple[Column, ...] = self.parts.columns
        return {
            part.talk: column_view(talk, number, named=name)
            for number, (part, name) in enumerate(zip(parts, names, strict=True))
        }


def _sampling(tokens: float | int | None, temperature: float | int | None) -> Sampling:
    """How an answer is chosen.

    Raises:
        UserError: a field of the settings was emptied.
    """
    if tokens is None or temperature is None:
        raise UserError("the settings lack a number; type one")
    return Sampling(max_new_tokens=max(1, int(tokens)), temperature=float(temperature))


def _begin(request: gr.Request) -> tuple[str, Any]:
    """The page is ready: questions are taken from now on."""
    return _person(request), gr.update(interactive=True)


def _person(request: gr.Request) -> str:
    """Who has the page open, as Gradio knows them."""
    return str(request.session_hash)
