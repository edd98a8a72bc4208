"""Requests as rows of a served model: their inputs, their adapters, and how each tells what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from dora_vl.app.answering import Answering, Failed, Finished, Piece, Stopped
from dora_vl.app.joined_decoding import JoinableDecoding, JoinedDecoding, Member, Members, Read, Reading
from dora_vl.app.row_decoding import RowText, drawing, generate_options
from dora_vl.app.served_model import ServedModel
from dora_vl.app.waiting_room import ENDING
from dora_vl.backbones.families import ALIGNED
from dora_vl.backbones.score_watch import end_tokens
from dora_vl.evaluation.prompt_inputs import BOOKKEEPING

BASE = ("", 0.0)
"""Before every share of an adapter."""
TOKENS = frozenset({"input_ids", *ALIGNED, *BOOKKEEPING})
"""Of a batch's inputs, those that are no pictures and videos."""


class ModelRows:
    """Puts requests to a model.

    Args:
        model: what is asked.
        ending: whether nobody waits for any answer any more.
    """

    def __init__(self, model: ServedModel, ending: Callable[[], bool]) -> None:
        self._model = model
        self._ending = ending
        self.ends = end_tokens(model.backbone.model)
        """Tokens that end an answer."""

    def answer(self, batch: Sequence[Answering], newcomers: Callable[[Members, int], Sequence[Read]]) -> None:
        """Answers a batch, and what `newcomers` reads meanwhile; see `JoinedDecoding`."""
        members, inputs, media = self.begin(batch)
        decoding = JoinedDecoding(
            members=members, ends=self.ends, media=media, holding=self._holding, newcomers=newcomers, order=_share
        )
        most = max(one.text.sampling.max_new_tokens for one in members)
        self._run(members, inputs, most, decoding)

    def read(self, come: Sequence[Answering]) -> Read:
        """Reads the prompts of requests that may join a batch.

        Raises:
            ValueError: they cannot.
        """
        members, inputs, media = self.begin(come)
        reading = Reading(media)
        self._run(members, inputs, 1, reading)
        ((rows, logits),) = reading.found
        return members, rows, logits

    def begin(self, batch: Sequence[Answering]) -> tuple[list[Member], Mapping[str, Any], frozenset[str]]:
        """The rows of requests, the base first and then adapter by adapter, their inputs, and which are media."""
        assistant = self._model.assistant
        made = (Member(one, self._text(one), drawing(one.prepared.sampling, assistant.device)) for one in batch)
        members = sorted(made, key=_share)
        inputs = assistant.prompts.collate([one.answering.prepared.sample for one in members], "left")
        return members, inputs, frozenset(inputs).difference(TOKENS)

    def _run(self, members: Members, inputs: Mapping[str, Any], most: int, decoding: JoinableDecoding) -> None:
        assistant = self._model.assistant
        options = generate_options([one.text for one in members], self.ends, assistant.device)
        pictures = [one.answering.prepared.pictures for one in members]
        with self._holding(members, pictures):
            assistant.new_ids(inputs, max_new_tokens=most, options={**options, "custom_generate": decoding})

    def _holding(self, members: Members, pictures: Sequence[int] = ()) -> AbstractContextManager[None]:
        """Meanwhile the model's rows are these; without `pictures`, none that shows any."""
        prepared = [one.answering.prepared for one in members]
        strengths = [one.strength for one in prepared]
        return self._model.rows([one.asked for one in prepared], pictures or [0] * len(prepared), strengths)

    def _text(self, one: Answering) -> RowText:
        """A row that tells its end at once, whatever the others do."""
        prepared = one.prepared

        def done(row: RowText) -> None:
            if row.error is not None:
                one.tell(Failed(row.error))
            elif row.reason != "ended":
                one.tell(Finished(row.reason or "length", row.text, len(prepared.sample.input_ids), len(row.ids)))
            elif self._ending():
                one.tell(Failed(Stopped(ENDING)))
            else:
                one.give_up()

        return RowText(
            prepared.sampling,
            prepared.asked.prompts.growing_text(),
            write=lambda text: one.tell(Piece(text)),
            over=lambda: one.unwanted or self._ending(),
            done=done,
        )


def _share(one: Member) -> tuple[str, float]:
    """By which rows are sorted."""
    return one.answering.prepared.share or BASE
