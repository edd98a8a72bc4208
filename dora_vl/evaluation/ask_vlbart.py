"""A trained VL-BART as something that answers a benchmark: features are computed on the way, one question at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from string import ascii_uppercase

from PIL import Image
from tqdm import tqdm

from dora_vl.data.dataset import Skipped
from dora_vl.data.examples import Example
from dora_vl.data.feature_input import clip_of_features
from dora_vl.data.media import open_image
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.answer_joins import LABELLED
from dora_vl.evaluation.ask import Asked, Asking, ask
from dora_vl.evaluation.evaluation_set import EvaluationSet
from dora_vl.evaluation.predict import note_failures, prediction_of
from dora_vl.evaluation.predictions_file import PredictionsFile
from dora_vl.evaluation.questions import Question
from dora_vl.evaluation.vlbart_assistant import VlBartAssistant
from dora_vl.tasks.subtask import Subtask
from dora_vl.vision.video import VideoReader

TASK_FILES = {"vlbart_image": "dora_vl.tasks.vlbart_image", "vlbart_video": "dora_vl.tasks.vlbart_video"}
TASKS: Mapping[str, str] = {"vqav2_karpathy": "vqav2"}
"""Benchmark -> the task that it is asked as, where the names differ."""


def subtasks_of(task: str, *, task_prompt: bool) -> Mapping[str, Subtask]:
    """Every task of a VL-BART task file, by the file's name; `task_prompt` as in training.

    Raises:
        UserError: no such task file.
    """
    if task not in TASK_FILES:
        raise UserError(f"the adapter was trained by {task!r}; there are {', '.join(TASK_FILES)}")
    return import_module(TASK_FILES[task]).subtasks(task_prompt=task_prompt)


@dataclass(frozen=True, kw_only=True)
class VlBartModel:
    """A VL-BART and what tells it from others; `ask_model.Model` is a LLaVA.

    Attributes:
        base_sha256: of the base's config and weights, wherever they are.
    """

    assistant: VlBartAssistant
    adapter_sha256: str
    base_sha256: str

    def ask(self, one: EvaluationSet, asking: Asking) -> Asked:
        """Puts a benchmark's questions to the model as in training; what fails is named and counted.

        Its own search decides how long an answer is.
        """
        examples = {example.id: example for example in one.examples if example.id not in one.unreadable}
        questions = [
            Question(
                id=example.id,
                images=example.images,
                turns=(Turn("user", example.question),),
                truth=example.answers[0].text if example.answers else "",
                kind=None if "kind" not in example.extra else str(example.extra["kind"]),
                video=example.video,
            )
            for example in examples.values()
        ]
        with VideoReader() as videos:
            share = partial(
                self._answer, examples=examples, task=TASKS.get(one.name, one.name), root=asking.pictures, videos=videos
            )
            settings = asking.settings(one, adapter_sha256=self.adapter_sha256, base_sha256=self.base_sha256)
            asked = ask(questions, share, folder=asking.folder, settings=settings)
        return Asked(answers=asked.answers, failed={**one.unreadable, **asked.failed})

    def _answer(
        self,
        share: Sequence[Question],
        file: PredictionsFile,
        *,
        examples: Mapping[str, Example],
        task: str,
        root: Path,
        videos: VideoReader,
    ) -> dict[str, str]:
        failed: dict[str, str] = {}
        for place, question in enumerate(tqdm(share, desc="answering", unit="question", disable=not share)):
            try:
                said = self._said(examples[question.id], task, root, videos)
            except UserError as error:
                reason = error.reason if isinstance(error, BadSample) else str(error)
                note_failures([Skipped(place, question.id, reason)], failed)
                continue
            file.add(prediction_of(question, said))
            file.flush()
        return failed

    def _said(self, example: Example, task: str, root: Path, videos: VideoReader) -> str:
        """What the benchmark's score takes: of a choice its letter, or its label where the score takes that."""
        assistant = self.assistant
        if example.video is None:
            pictures: Sequence[Image.Image] = [open_image(root, path) for path in example.images]
        else:
            video, example = example.video, assistant.with_span(example, task)
            _, clip = clip_of_features(example) or ("", video)
            pictures = videos.read(root, clip, assistant.sampling(example, task)).pictures
        said = assistant.said(example, pictures, task)
        by_letter = task not in LABELLED and assistant.answers_by_label(example, task)
        return ascii_uppercase[int(said.removeprefix("a"))] if by_letter else said
