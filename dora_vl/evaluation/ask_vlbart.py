"""A trained VL-BART as something that answers a benchmark: features are computed on the way, one question at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from string import ascii_uppercase

from PIL import Image
from tqdm import tqdm

from dora_vl.backbones.generation import NoNumbers
from dora_vl.data.example import Example
from dora_vl.data.pictures import MediaFolder, open_image
from dora_vl.data.samples import Skipped
from dora_vl.data.video import VideoReader
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.ask import Asking, ask
from dora_vl.evaluation.asker import Asked
from dora_vl.evaluation.predict import note_failures, prediction_of, refuse_without_numbers
from dora_vl.evaluation.predictions import PredictionsFile
from dora_vl.evaluation.questions import EvaluationSet, Question, question_of_task
from dora_vl.evaluation.vlbart_assistant import VlBartAssistant

TASKS: Mapping[str, str] = {"vqav2_karpathy": "vqav2"}
"""Benchmark -> the task that it is asked as, where the names differ."""


def ask_vlbart(assistant: VlBartAssistant, one: EvaluationSet, asking: Asking) -> Asked:
    """Puts a benchmark's questions to the model as in training; what fails is named and counted.

    Its own search decides how long an answer is, and whether choices are compared by likelihood.
    """
    examples = {example.id: example for example in one.examples if example.id not in one.unreadable}
    task = TASKS.get(one.name, one.name)
    with VideoReader() as videos:
        letters = not one.benchmark.labels_choices
        said = partial(_said, assistant, task=task, letters=letters, root=asking.pictures, videos=videos)
        share = partial(_answer_share, examples=examples, said=said)
        questions = [question_of_task(example) for example in examples.values()]
        asked = ask(questions, share, folder=asking.folder, settings=asking.settings(one))
    return replace(asked, failed={**one.unreadable, **asked.failed})


def _answer_share(
    share: Sequence[Question], file: PredictionsFile, *, examples: Mapping[str, Example], said: Callable[[Example], str]
) -> dict[str, str]:
    failed: dict[str, str] = {}
    broken: list[str] = []
    for place, question in enumerate(tqdm(share, desc="answering", unit="question", disable=not share)):
        try:
            answer = said(examples[question.id])
        except NoNumbers:
            broken.append(question.id)
            continue
        except UserError as error:
            reason = error.reason if isinstance(error, BadSample) else str(error)
            note_failures([Skipped(place, question.id, reason)], failed)
            continue
        file.add(prediction_of(question, answer))
        file.flush()
    refuse_without_numbers(broken)
    return failed


def _said(
    assistant: VlBartAssistant,
    example: Example,
    *,
    task: str,
    letters: bool,
    root: Path | MediaFolder,
    videos: VideoReader,
) -> str:
    """What the benchmark's score takes: of a choice its letter where it takes `letters`, else its label."""
    if example.video is None:
        pictures: Sequence[Image.Image] = [open_image(root, path) for path in example.images]
    else:
        view = assistant.view(example, frames=0, task=task)
        example, pictures = view.example, videos.read(root, view.clip, view.sampling).pictures
    said = assistant.said(example, pictures, task)
    by_letter = letters and assistant.answers_by_label(example, task)
    return ascii_uppercase[int(said.removeprefix("a"))] if by_letter else said
