"""Asks a model many questions: batched, left-padded, greedy or by likelihood, able to go on after a stop."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dora_vl.backbones.generation import NO_NUMBERS
from dora_vl.data.samples import Sample, Skipped
from dora_vl.errors import BadSample, UserError, one_line, shown_names, shown_text
from dora_vl.evaluation.asker import MediaReader
from dora_vl.evaluation.predictions import Prediction, PredictionsFile
from dora_vl.evaluation.prompt_inputs import Prompts
from dora_vl.evaluation.questions import Question

log = logging.getLogger(__name__)

WARNED_FAILURES = 20  # more are counted, and named in metrics.json


@runtime_checkable
class BatchAnswerer(Protocol):
    """`assistant.Assistant`, as far as asking in batches needs it."""

    @property
    def prompts(self) -> Prompts:
        """What makes its inputs."""
        ...

    def answers(self, batch: Mapping[str, Any], *, max_new_tokens: int) -> list[str | None]:
        """The text of each row's answer, None where the scores were no numbers; the rows are padded on the left."""
        ...


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the questions are answered.

    Attributes:
        batch_size: questions at once.
        max_new_tokens: longest answer.
        workers: processes that read pictures ahead; 0 reads them in this one.
        max_positions: what the model takes of a prompt and its answer together; None: no end.
    """

    batch_size: int = 32
    max_new_tokens: int = 16
    workers: int = 0
    max_positions: int | None = None

    def check_room(self, prompt_tokens: int, sample_id: str) -> None:
        """Sees that a prompt leaves room for the longest answer.

        Raises:
            BadSample: it does not; both numbers are named.
        """
        needed = prompt_tokens + self.max_new_tokens
        if self.max_positions is not None and needed > self.max_positions:
            raise BadSample(
                sample_id,
                f"its prompt takes {prompt_tokens} tokens and its answer up to {self.max_new_tokens}, but the model "
                f"has {self.max_positions} positions; shorten it, or allow a shorter answer",
            )


class QuestionSamples(Dataset["Sample | Skipped"]):
    """Questions as samples without labels; what cannot be asked comes back as `Skipped`."""

    def __init__(self, questions: Sequence[Question], prompts: Prompts, media: MediaReader, decoding: Decoding) -> None:
        self._questions = questions
        self._prompts = prompts
        self._media = media
        self._decoding = decoding

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: int) -> Sample | Skipped:
        question = self._questions[index]
        try:
            sample = self._prompts.sample(question.turns, self._media.read(question))
            self._decoding.check_room(len(sample.input_ids), question.id)
            return replace(sample, index=index, id=question.id)
        except BadSample as error:
            return Skipped(index, question.id, error.reason)


@dataclass(frozen=True)
class _NamedBatch:
    """A batch that knows which question each of its rows is; None where none of them can be asked."""

    indices: list[int]
    skipped: list[Skipped]
    batch: Mapping[str, Any] | None


@dataclass(frozen=True)
class _NamingCollator:
    prompts: Prompts

    def __call__(self, items: list[Sample | Skipped]) -> _NamedBatch:
        samples = [item for item in items if isinstance(item, Sample)]
        skipped = [item for item in items if isinstance(item, Skipped)]
        batch = self.prompts.collate(samples, "left") if samples else None
        return _NamedBatch([sample.index for sample in samples], skipped, batch)


def predict(
    assistant: BatchAnswerer,
    questions: Sequence[Question],
    *,
    media: MediaReader,
    file: PredictionsFile,
    decoding: Decoding,
) -> dict[str, str]:
    """Answers every question that `file` has no prediction for, and appends the answers to it.

    The longest prompts go first: if memory is short, that shows at once, and the time left is never underestimated.

    Args:
        media: reads what the questions show.
        file: receives a line for each answer, batch by batch.

    Returns:
        The reason for each question that could not be asked, by id; it gets no line in the file, so that the next
        run asks it again.

    Raises:
        UserError: the model's scores were no numbers for some questions, which have no line in the file either. Those
            that it can answer are answered first; it ends at a batch of which it can answer none.
    """
    todo = unanswered(questions, file)
    todo.sort(key=_length, reverse=True)
    failed: dict[str, str] = {}
    broken: list[str] = []
    with tqdm(total=len(todo), desc="answering", unit="question", disable=not todo) as progress:
        for batch in answered(assistant, todo, media=media, decoding=decoding):
            note_failures(batch.skipped, failed)
            for question, answer in batch.answers:
                file.add(prediction_of(question, answer))
            file.flush()
            progress.update(len(batch.answers) + len(batch.skipped))
            broken += batch.without_numbers
            if batch.without_numbers and not batch.answers:
                break
    refuse_without_numbers(broken)
    return failed


def refuse_without_numbers(ids: Sequence[str]) -> None:
    """Raises a `UserError` that names questions for which the model's scores were no numbers, where there are any."""
    if ids:
        raise UserError(f"question {shown_names(ids)}: {NO_NUMBERS}")


@dataclass(frozen=True)
class AnsweredBatch:
    """What came of a batch of questions."""

    answers: list[tuple[Question, str]]
    skipped: list[Skipped]
    without_numbers: list[str]
    """Ids of those for which the model's scores were no numbers."""


def answered(
    assistant: BatchAnswerer, questions: Sequence[Question], *, media: MediaReader, decoding: Decoding
) -> Iterator[AnsweredBatch]:
    """Answers questions in their order, batch by batch."""
    loader = DataLoader(
        QuestionSamples(questions, assistant.prompts, media, decoding),
        batch_size=decoding.batch_size,
        collate_fn=_NamingCollator(assistant.prompts),
        num_workers=decoding.workers,
    )
    for named in loader:
        texts = [] if named.batch is None else assistant.answers(named.batch, max_new_tokens=decoding.max_new_tokens)
        pairs = [(questions[index], text) for index, text in zip(named.indices, texts, strict=True)]
        yield AnsweredBatch(
            [(question, text.strip()) for question, text in pairs if text is not None],
            named.skipped,
            [question.id for question, text in pairs if text is None],
        )


def unanswered(questions: Sequence[Question], file: PredictionsFile) -> list[Question]:
    """The questions that a file has no prediction for; how many it has is reported."""
    todo = [question for question in questions if question.id not in file.done]
    if len(todo) < len(questions):
        log.info("%d of %d questions were answered by an earlier run", len(questions) - len(todo), len(questions))
    return todo


def _length(question: Question) -> tuple[int, int, int]:
    return len(question.videos), len(question.images), sum(len(turn.text) for turn in question.turns)


def note_failures(skipped: Sequence[Skipped], failed: dict[str, str]) -> None:
    """Adds what could not be asked to `failed`, and says it of the first ones."""
    for item in skipped:
        failed[item.id] = item.reason
        if len(failed) <= WARNED_FAILURES:
            log.warning("question %s could not be asked: %s", shown_text(item.id), one_line(item.reason))


def prediction_of(question: Question, answer: str) -> Prediction:
    """A question and its answer as a line of the file."""
    return Prediction(
        id=question.id,
        images=list(question.images),
        question=question.text,
        truth=question.truth,
        prediction=answer,
        kind=question.kind,
    )
