"""A run's test before it is due: tried before training, and some of its questions asked while that goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from dora_vl.data.example import Example
from dora_vl.data.samples import Examples
from dora_vl.evaluation.ask import Asker, Assistant, Decoding, MediaReader, media_reader
from dora_vl.evaluation.questions import (
    Question,
    in_words,
    question_of_turns,
)
from dora_vl.run.watched import Watch, WatchedQuestion, evenly

MOST_NEW_TOKENS = 32


def watch_assistant(
    assistant: Assistant, questions: Sequence[Question], media: MediaReader, *, max_new_tokens: int, source: str
) -> Watch | None:
    """Has an assistant's model, made with `while_training`, answer questions while it trains; None without any."""
    decoding = Decoding(batch_size=max(1, len(questions)), max_new_tokens=min(max_new_tokens, MOST_NEW_TOKENS))
    return watch_questions([(assistant, questions, decoding)], media, source=source)


def questions_of_rows(examples: Examples, count: int) -> list[Question]:
    """So many usable examples, evenly over all, their last answers being the right ones."""
    chosen = (examples[index] for index in evenly(range(len(examples)), count))
    return [question_of_turns(example) for example in chosen if isinstance(example, Example)]  # validation names others


def watch_questions(
    parts: Sequence[tuple[Asker, Sequence[Question], Decoding]], media: MediaReader | None, *, source: str
) -> Watch | None:
    """Has models answer questions, each its own, while training goes on; without `media` pictures are not shown."""
    questions = [question for _, several, _ in parts for question in several]
    shows = {question.id for question in questions if question.images or question.videos}
    reader = media or media_reader(Path(), frames=1)

    def ask_now() -> Mapping[str, str]:
        answers: dict[str, str] = {}
        for model, several, decoding in parts:
            by_id = {question.id: question.example for question in several}
            for rows in model.predict(several, reader, decoding) if several else ():
                answers |= {row.id: in_words(by_id[row.id], row.prediction) for row in rows if not row.error}
        return answers

    missing = "evaluation.image_folder names no folder of pictures"
    watched = [
        WatchedQuestion(
            id=question.id,
            question=question.text or "(describe it)",
            truth=question.truth,
            why_no_picture=missing if media is None and question.id in shows else "",
        )
        for question in questions
    ]
    shown = [] if media is None else [question for question in questions if question.id in shows]
    pictures = {question.id: partial(reader.picture, question) for question in shown}
    return Watch(questions=tuple(watched), pictures=pictures, ask=ask_now, source=source) if questions else None
