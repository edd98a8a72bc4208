"""The likeliest letter among a question's choices, by any decoder: no word of an answer has to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from string import ascii_uppercase
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from dora_vl.data.dataset import Sample, Skipped
from dora_vl.errors import BadSample
from dora_vl.evaluation.predict import Decoding, note_failures, prediction_of, unanswered
from dora_vl.evaluation.predictions_file import PredictionsFile
from dora_vl.evaluation.prompt_inputs import Prompts
from dora_vl.evaluation.questions import Question
from dora_vl.evaluation.shown import MediaReader


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
    """
    failed: dict[str, str] = {}
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
        file.add(prediction_of(question, ascii_uppercase[scores.index(max(scores))]))
        file.flush()
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
