"""Fixed questions put to the model that trains: chosen from validation data or the test, answered as in the test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from dora_vl.data.example import Example
from dora_vl.data.samples import Examples
from dora_vl.evaluation.asker import MediaReader
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.predict import answered
from dora_vl.evaluation.questions import Question
from dora_vl.training.watching import Watch, WatchedQuestion, evenly

MOST_NEW_TOKENS = 32


def questions_of_rows(examples: Examples, count: int) -> list[Question]:
    """So many usable examples, evenly over all, their last answers being the right ones."""
    questions: list[Question] = []
    for example in (examples[place] for place in evenly(range(len(examples)), count)):
        if isinstance(example, Example):  # validation counts and names what is none
            *asked, answer = example.turns
            questions.append(
                Question(
                    id=example.id,
                    images=example.images,
                    turns=tuple(asked),
                    truth=answer.text,
                    videos=example.videos,
                )
            )
    return questions


def watch_assistant(
    assistant: Assistant, questions: Sequence[Question], media: MediaReader, *, max_new_tokens: int, source: str
) -> Watch | None:
    """Has an assistant's model answer questions while it trains; None where there are none.

    Args:
        assistant: made with `while_training`.
        max_new_tokens: longest answer; at most 32, to look at.
    """
    if not questions:
        return None
    decoding = assistant.decoding(batch_size=len(questions), max_new_tokens=min(max_new_tokens, MOST_NEW_TOKENS))

    def ask() -> Mapping[str, str]:
        batches = answered(assistant, questions, media=media, decoding=decoding)
        return {question.id: answer for batch in batches for question, answer in batch.answers}

    return Watch(
        questions=tuple(WatchedQuestion(id=one.id, question=one.text, truth=one.truth) for one in questions),
        pictures={one.id: partial(media.picture, one) for one in questions if one.images or one.videos},
        ask=ask,
        source=source,
    )
