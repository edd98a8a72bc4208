"""Asks a model many questions: batched, left-padded, greedy, able to go on after a stop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dora_vl.data.collate import Batch, Collator
from dora_vl.data.dataset import IGNORED_LABEL, Sample, Skipped
from dora_vl.data.turns import IMAGE_PLACEHOLDER, Turn
from dora_vl.errors import BadSample
from dora_vl.evaluation.predictions_file import Prediction, PredictionsFile
from dora_vl.evaluation.questions import Question
from dora_vl.run.picture_reading import PictureReader

log = logging.getLogger(__name__)

WARNED_FAILURES = 20  # more are counted, and named in metrics.json
PADDING_ID = 0  # fills the left of shorter prompts; masked, so that any id but a picture's does


@runtime_checkable
class Answerer(Protocol):
    """A backbone, as far as asking needs it."""

    def generate(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        *,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        max_new_tokens: int = 16,
    ) -> Int[Tensor, "batch new"]:
        """New token ids of left-padded prompts, greedy; a row that ended earlier is filled up."""
        ...


@runtime_checkable
class PromptEncoder(Protocol):
    """A backbone's encoder, as far as asking needs it."""

    def encode_prompt(self, turns: Sequence[Turn]) -> Int[Tensor, " seq"]:
        """Ids up to where the answer begins; raises `BadSample` where the turns cannot be put to the model."""
        ...

    def decode(self, ids: Int[Tensor, " new"]) -> str:
        """The text of new ids, without what ends or fills up an answer."""
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


class Prompts(Dataset["Sample | Skipped"]):
    """Questions as samples without labels; what cannot be asked comes back as `Skipped`."""

    def __init__(
        self, questions: Sequence[Question], encoder: PromptEncoder, pictures: PictureReader, decoding: Decoding
    ) -> None:
        self._questions = questions
        self._decoding = decoding
        self._encoder = encoder
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: int) -> Sample | Skipped:
        question = self._questions[index]
        try:
            frames = self._frames(question)
            ids = self._encoder.encode_prompt(with_frames(question.turns, len(frames)))
            self._decoding.check_room(len(ids), question.id)
            return Sample(
                index=index,
                id=question.id,
                input_ids=ids,
                labels=torch.full_like(ids, IGNORED_LABEL),
                pictures=(*frames, *_each(self._pictures.pixels, question.images)),
                features=_each(self._pictures.features, question.images),
            )
        except BadSample as error:
            return Skipped(index, question.id, error.reason)

    def _frames(self, question: Question) -> tuple[Tensor, ...]:
        if question.video is None:
            return ()
        if self._pictures.frames is None:
            raise BadSample(question.id, "it has a video, of which this run reads no frames")
        return tuple(self._pictures.frames(question.video))


def with_frames(turns: Sequence[Turn], frames: int) -> Sequence[Turn]:
    """The turns with a placeholder for each frame of a video before everything else that the user says."""
    asked = next((place for place, turn in enumerate(turns) if turn.role == "user"), None)
    if not frames or asked is None:
        return turns
    first = Turn("user", f"{IMAGE_PLACEHOLDER}\n" * frames + turns[asked].text)
    return [*turns[:asked], first, *turns[asked + 1 :]]


def _each(read: Callable[[str], Tensor] | None, paths: Sequence[str]) -> tuple[Tensor, ...]:
    return tuple(read(path) for path in paths) if read else ()


@dataclass(frozen=True)
class _NamedBatch:
    """A batch that knows which question each of its rows is."""

    indices: list[int]
    skipped: list[Skipped]
    batch: Batch


@dataclass(frozen=True)
class _NamingCollator:
    collate: Collator

    def __call__(self, items: list[Sample | Skipped]) -> _NamedBatch:
        indices = [item.index for item in items if isinstance(item, Sample)]
        skipped = [item for item in items if isinstance(item, Skipped)]
        return _NamedBatch(indices, skipped, self.collate(items))


def predict(
    backbone: Answerer,
    encoder: PromptEncoder,
    questions: Sequence[Question],
    *,
    pictures: PictureReader,
    file: PredictionsFile,
    decoding: Decoding,
) -> dict[str, str]:
    """Answers every question that `file` has no prediction for, and appends the answers to it.

    The longest prompts go first: if memory is short, that shows at once, and the time left is never underestimated.

    Args:
        file: receives a line for each answer, batch by batch.

    Returns:
        The reason for each question that could not be asked, by id; it gets no line in the file, so that the next
        run asks it again.
    """
    todo = [question for question in questions if question.id not in file.done]
    if len(todo) < len(questions):
        log.info("%d of %d questions were answered by an earlier run", len(questions) - len(todo), len(questions))
    todo.sort(key=_length, reverse=True)
    loader = DataLoader(
        Prompts(todo, encoder, pictures, decoding),
        batch_size=decoding.batch_size,
        collate_fn=_NamingCollator(Collator(pad_token_id=PADDING_ID, pad_side="left")),
        num_workers=decoding.workers,
    )
    failed: dict[str, str] = {}
    with tqdm(total=len(todo), desc="answering", unit="question", disable=not todo) as progress:
        for named in loader:
            note_failures(named.skipped, failed)
            answers = _answer(backbone, encoder, named, decoding.max_new_tokens)
            for index, answer in zip(named.indices, answers, strict=True):
                file.add(prediction_of(todo[index], answer))
            file.flush()
            progress.update(len(named.indices) + len(named.skipped))
    return failed


def _length(question: Question) -> tuple[bool, int, int]:
    return question.video is not None, len(question.images), sum(len(turn.text) for turn in question.turns)


def _answer(backbone: Answerer, encoder: PromptEncoder, named: _NamedBatch, max_new_tokens: int) -> list[str]:
    if not named.indices:  # the collator's placeholder row is no question
        return []
    device = next(iter(backbone.parameters())).device if isinstance(backbone, torch.nn.Module) else "cpu"
    batch = named.batch
    pixels, features = batch.get("pixel_values"), batch.get("image_features")
    with torch.inference_mode():
        new_ids = backbone.generate(
            batch["input_ids"].to(device),
            batch["attention_mask"].to(device),
            pixel_values=None if pixels is None else pixels.to(device),
            image_features=None if features is None else features.to(device),
            max_new_tokens=max_new_tokens,
        )
    return [encoder.decode(row).strip() for row in new_ids.cpu()]


def note_failures(skipped: Sequence[Skipped], failed: dict[str, str]) -> None:
    """Adds what could not be asked to `failed`, and says it of the first ones."""
    for item in skipped:
        failed[item.id] = item.reason
        if len(failed) <= WARNED_FAILURES:
            log.warning("question %s could not be asked: %s", item.id, item.reason)


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
