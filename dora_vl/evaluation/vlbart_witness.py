"""A VL-BART as a certificate asks it: examples as its tasks have them, features of the pictures computed on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from dora_vl.data.example import Example
from dora_vl.data.pictures import open_image
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.asker import MediaReader
from dora_vl.evaluation.certificate import Logits, Probe
from dora_vl.evaluation.open_model import ModelSource
from dora_vl.evaluation.questions import Question
from dora_vl.evaluation.seq2seq_run import LONGEST_LABEL
from dora_vl.evaluation.vlbart_assistant import VlBartAssistant, open_vlbart


@dataclass(frozen=True, kw_only=True)
class VlBartWitness:
    """A `certificate.Witness`.

    Attributes:
        examples: by id.
        task: the trained task that they belong to; "" tells it by each question's form.
    """

    assistant: VlBartAssistant
    examples: Mapping[str, Example]
    task: str = ""

    def answers(self, questions: Sequence[Question], probe: Probe, path: Path) -> tuple[dict[str, str], dict[str, str]]:
        """See `Witness.answers`: what each task's score takes, at the length of its own search."""
        answers: dict[str, str] = {}
        failed: dict[str, str] = {}
        for question in tqdm(questions, desc="answering", unit="question"):
            try:
                answers[question.id] = self.assistant.said(*self._seen(question, probe.media), self.task)
            except UserError as error:
                failed[question.id] = error.reason if isinstance(error, BadSample) else str(error)
        return answers, failed

    @torch.inference_mode()
    def logits(self, question: Question, answer: str, media: MediaReader) -> Logits:
        """See `Witness.logits`; of a closed list, its answers' scores."""
        example, pictures = self._seen(question, media)
        subtask, (ids, mask, features) = self.assistant.prepared(example, pictures, self.task)
        backbone = self.assistant.backbone
        if subtask.answer_by == "closed":
            return backbone.answer_head(subtask.name)(backbone.first_hidden(ids, mask, features)).float().cpu()
        text = example.choices[int(answer.removeprefix("a"))] if subtask.answer_by == "words" else answer
        labels = self.assistant.encoder.labels(text, max_tokens=LONGEST_LABEL)[None].to(ids.device)
        return backbone(ids, mask, labels, features).logits.float().cpu()

    def _seen(self, question: Question, media: MediaReader) -> tuple[Example, Sequence[Image.Image]]:
        """The example as the model is asked it, and what it looks at."""
        example = self.examples[question.id]
        if example.video is None:
            return example, [open_image(media.folder, path) for path in example.images]
        view = self.assistant.view(example, frames=0, task=self.task)
        frames = media.videos.reader.read(media.videos.folder, view.clip, view.sampling)
        return view.example, frames.pictures


def open_witness(source: ModelSource, examples: Mapping[str, Example], task: str) -> VlBartWitness:
    """The adapter on its base, or, where the source's place is `Wanted.model`, what it was merged into."""
    opened = open_vlbart(source, merged=source.wanted.model is not None).adapted
    assert isinstance(opened, VlBartAssistant)
    return VlBartWitness(assistant=opened, examples=examples, task=task)
