"""A benchmark put to a decoder of any kind: batched, greedily, or the likeliest letter of each question's choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isnan
from string import ascii_uppercase
from types import FunctionType
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from dora_vl.data.example import MIDDLE_FRAME, Example
from dora_vl.data.samples import Sample, Skipped
from dora_vl.data.video import Uniform
from dora_vl.errors import BadSample
from dora_vl.evaluation.ask import Asking, ask
from dora_vl.evaluation.asker import Asked, MediaReader, videos_placed
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.predict import (
    Decoding,
    note_failures,
    predict,
    prediction_of,
    refuse_without_numbers,
    unanswered,
)
from dora_vl.evaluation.predictions import PredictionsFile
from dora_vl.evaluation.prompt_inputs import Prompts
from dora_vl.evaluation.questions import EvaluationSet, Question
from dora_vl.evaluation.scores.prompts import Prompt, turns_of
from dora_vl.training.run_media import VideoReading


@runtime_checkable
class Chooser(Protocol):
    """`assistant.Assistant`, as far as choosing needs it."""

    @property
    def prompts(self) -> Prompts:
        """What makes its inputs."""
        ...

    def log_likelihoods(self, samples: Sequence[Sample]) -> Float[Tensor, " samples"]:
        """Of each sample's labelled tokens."""
        ...


def choose_letters(
    assistant: Chooser,
    questions: Sequence[Question],
    *,
    choices: Mapping[str, int],
    media: MediaReader,
    file: PredictionsFile,
    decoding: Decoding,
) -> dict[str, str]:
    """Writes the likeliest letter of every question that `file` has no prediction for; of equals the first.

    What is compared is the likelihood of a letter with what closes the answer. A batch holds at most
    `decoding.batch_size` choices, all of one question.

    Args:
        choices: how many choices each question has, by id.

    Returns:
        The reason for each question that could not be asked, by id.

    Raises:
        UserError: likelihoods were no numbers; the other questions are answered first.
    """
    failed: dict[str, str] = {}
    broken: list[str] = []
    todo = unanswered(questions, file)
    for place, question in enumerate(tqdm(todo, desc="choosing", unit="question", disable=not todo)):
        try:
            samples = _with_each_letter(assistant.prompts, question, choices[question.id], media, decoding)
        except BadSample as error:
            note_failures([Skipped(place, question.id, error.reason)], failed)
            continue
        scores = [
            float(score)
            for start in range(0, len(samples), decoding.batch_size)
            for score in assistant.log_likelihoods(samples[start : start + decoding.batch_size])
        ]
        if any(map(isnan, scores)):
            broken.append(question.id)
            continue
        file.add(prediction_of(question, ascii_uppercase[scores.index(max(scores))]))
        file.flush()
    refuse_without_numbers(broken)
    return failed


def _with_each_letter(
    prompts: Prompts, question: Question, choices: int, media: MediaReader, decoding: Decoding
) -> list[Sample]:
    if not 0 < choices <= len(ascii_uppercase):
        raise BadSample(question.id, f"it has {choices} choices; letters are chosen among 1 to {len(ascii_uppercase)}")
    seen = media.read(question)
    samples = [prompts.with_answer(question.turns, seen, letter) for letter in ascii_uppercase[:choices]]
    replace(decoding, max_new_tokens=0).check_room(max(len(sample.input_ids) for sample in samples), question.id)
    return samples


def ask_decoder(assistant: Assistant, one: EvaluationSet, asking: Asking) -> Asked:
    """Puts a benchmark's questions to the model; see `Asker.ask`."""
    prompt = one.benchmark.prompt
    examples = [with_middle_frame(example) for example in one.examples if example.id not in one.unreadable]
    same = asking.frames if assistant.prompts.videos_of_one_length else None
    videos = VideoReading(folder=asking.pictures, sampling=Uniform(asking.frames), frames=same)
    media = MediaReader(folder=asking.pictures, videos=videos)
    decoding = assistant.decoding(
        batch_size=asking.batch_size, max_new_tokens=asking.max_new_tokens, workers=asking.workers
    )
    choices = {example.id: len(example.choices) for example in examples}
    way = partial(choose_letters, choices=choices) if asking.by_likelihood else predict
    try:
        asked = ask(
            [question(example, prompt) for example in examples],
            lambda share, file: way(assistant, share, media=media, file=file, decoding=decoding),
            folder=asking.folder,
            settings={
                **asking.settings(one),
                "prompt": prompt.__name__ if isinstance(prompt, FunctionType) else repr(prompt),
                **({"frames": asking.frames} if any(example.videos for example in examples) else {}),
                **({"answers": "likelihood"} if asking.by_likelihood else {}),
            },
        )
    finally:
        media.close()
    return replace(asked, failed={**one.unreadable, **asked.failed})


def with_middle_frame(example: Example) -> Example:
    """The example with its video's middle frame as its picture, where the record names one, as SEED-Bench's do."""
    frame = example.extra.get(MIDDLE_FRAME)
    if example.video is None or not isinstance(frame, str):
        return example
    return replace(example, images=(frame,), videos=())


def question(example: Example, prompt: Prompt) -> Question:
    """An example as the model is asked it."""
    truth = example.answers[0].text if example.answers else ""
    kind = example.extra.get("kind")
    return Question(
        id=example.id,
        images=example.images,
        turns=tuple(videos_placed(turns_of(example, prompt), len(example.videos))),
        truth=truth,
        kind=None if kind is None else str(kind),
        videos=example.videos,
    )
