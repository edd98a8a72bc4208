"""A trained adapter as something that answers a benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers.utils import logging as transformers_logging

from dora_vl.core.adapter_file import RECIPE_FILE, WEIGHTS_FILE, read_json
from dora_vl.data.examples import Example
from dora_vl.errors import UserError
from dora_vl.evaluation.ask import Asked, ask
from dora_vl.evaluation.assistant import Assistant, open_assistants
from dora_vl.evaluation.evaluation_set import EvaluationSet
from dora_vl.evaluation.predict import Decoding, PictureReader
from dora_vl.evaluation.predictions_file import file_sha256
from dora_vl.evaluation.prompts import Prompt, turns_of
from dora_vl.evaluation.questions import Question
from dora_vl.training.picture_reading import read_pixels

VIDEO = "it has a video, which a LLaVA of pictures cannot be asked about; score a file of answers with --predictions"


@dataclass(frozen=True, kw_only=True)
class Model:
    """An assistant and what tells it from others."""

    assistant: Assistant
    adapter_sha256: str

    def ask(
        self,
        one: EvaluationSet,
        *,
        folder: Path,
        pictures: Path,
        batch_size: int,
        max_new_tokens: int,
        workers: int = 0,
    ) -> Asked:
        """Puts a benchmark's questions, greedily and left-padded, to the model; what fails is named and counted.

        Args:
            folder: receives `predictions.jsonl`.
            pictures: root of the examples' pictures.
        """
        if not pictures.is_dir():
            raise UserError(f"picture folder {pictures} does not exist; name the pictures' root with --images")
        prompt, failed = one.benchmark.prompt, dict(one.unreadable)
        failed |= {example.id: VIDEO for example in one.examples if example.video is not None}
        asked = ask(
            self.assistant.backbone,
            self.assistant.encoder,
            [question(example, prompt) for example in one.examples if example.id not in failed],
            pictures=PictureReader(
                pixels=partial(read_pixels, folder=pictures, preparation=self.assistant.preparation)
            ),
            folder=folder,
            decoding=Decoding(batch_size=batch_size, max_new_tokens=max_new_tokens, workers=workers),
            settings={
                "adapter_sha256": self.adapter_sha256,
                "questions_sha256": file_sha256(one.file),
                "prompt": prompt.__name__,
                "max_new_tokens": max_new_tokens,
            },
        )
        return Asked(answers=asked.answers, failed=failed | asked.failed)


def question(example: Example, prompt: Prompt) -> Question:
    """An example as the model is asked it."""
    truth = example.answers[0].text if example.answers else ""
    return Question(id=example.id, images=example.images, turns=turns_of(example, prompt), truth=truth)


def open_model(adapter: Path, *, base: str | None = None, any_base: bool = False) -> Model:
    """The model of an adapter folder, quietly.

    Raises:
        UserError: the folder is incomplete, no LLaVA's, or its base is not there.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    recipe = read_json(adapter / RECIPE_FILE) if (adapter / RECIPE_FILE).is_file() else {}
    if "task" in recipe and "template" not in recipe:
        raise UserError(
            f"{adapter} was trained as {recipe['task']}, which is no LLaVA: its run answers its own test sets; "
            "score what they gave with --predictions FILE"
        )
    assistant = open_assistants(adapter, base=base, any_base=any_base).adapted
    return Model(assistant=assistant, adapter_sha256=file_sha256(adapter / WEIGHTS_FILE))
