"""A trained adapter as something that answers a benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from dora_vl.backbones.base import max_positions
from dora_vl.core.adapter_file import RECIPE_FILE, WEIGHTS_FILE, read_json
from dora_vl.data.examples import Example
from dora_vl.errors import UserError
from dora_vl.evaluation.ask import Asked, ask
from dora_vl.evaluation.assistant import Assistant, find_base, open_assistants
from dora_vl.evaluation.evaluation_set import EvaluationSet
from dora_vl.evaluation.predict import Decoding, PictureReader
from dora_vl.evaluation.predictions_file import file_sha256
from dora_vl.evaluation.prompts import Prompt, turns_of
from dora_vl.evaluation.questions import Question
from dora_vl.training.picture_reading import read_pixels
from dora_vl.training.provenance import content_hash, local_folder

COMMONSENSE = "commonsense"
MIDDLE_FRAME = "middle_frame"
"""In an example's `extra`: the picture that LLaVA-1.5 takes for its video."""
VIDEO = "it has a video, which a LLaVA of pictures cannot be asked about; score a file of answers with --predictions"


@dataclass(frozen=True, kw_only=True)
class Model:
    """An assistant and what tells it from others.

    Attributes:
        base_sha256: of the base's config and weights, wherever they are.
    """

    assistant: Assistant
    adapter_sha256: str
    base_sha256: str

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
        examples = [shown(example) for example in one.examples]
        failed |= {example.id: VIDEO for example in examples if example.video is not None}
        asked = ask(
            self.assistant.backbone,
            self.assistant.encoder,
            [question(example, prompt) for example in examples if example.id not in failed],
            pictures=PictureReader(
                pixels=partial(read_pixels, folder=pictures, preparation=self.assistant.preparation)
            ),
            folder=folder,
            decoding=Decoding(
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                workers=workers,
                max_positions=max_positions(self.assistant.backbone.config),
            ),
            settings={
                "adapter_sha256": self.adapter_sha256,
                "base_sha256": self.base_sha256,
                "questions_sha256": file_sha256(one.file),
                "images": str(pictures.resolve()),
                "prompt": prompt.__name__,
                "max_new_tokens": max_new_tokens,
            },
        )
        return Asked(answers=asked.answers, failed=failed | asked.failed)


def shown(example: Example) -> Example:
    """The example with its video's middle frame as its picture, where the record names one, as SEED-Bench's do."""
    frame = example.extra.get(MIDDLE_FRAME)
    if example.video is None or not isinstance(frame, str):
        return example
    return replace(example, images=(frame,), video=None)


def question(example: Example, prompt: Prompt) -> Question:
    """An example as the model is asked it."""
    truth = example.answers[0].text if example.answers else ""
    kind = example.extra.get("kind")
    return Question(
        id=example.id,
        images=example.images,
        turns=turns_of(example, prompt),
        truth=truth,
        kind=None if kind is None else str(kind),
    )


def open_model(adapter: Path, *, base: str | None = None, any_base: bool = False) -> Model:
    """The model of an adapter folder, quietly.

    Raises:
        UserError: the folder is incomplete, no LLaVA's, or its base is not there.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    recipe = read_json(adapter / RECIPE_FILE) if (adapter / RECIPE_FILE).is_file() else {}
    if "task" in recipe and "template" not in recipe:
        raise UserError(_no_llava(adapter, str(recipe["task"])))
    assistant = open_assistants(adapter, base=base, any_base=any_base).adapted
    return Model(
        assistant=assistant,
        adapter_sha256=file_sha256(adapter / WEIGHTS_FILE),
        base_sha256=_base_sha256(adapter, recipe, base) if any_base else str(recipe["base_sha256"]),
    )


def _base_sha256(adapter: Path, recipe: Mapping[str, Any], base: str | None) -> str:
    """The hash of a base that was not compared with the recipe's; by now it is on this disk."""
    place = find_base(base or recipe["base"], adapter)
    return content_hash(local_folder(place, None if base else recipe["revision"]))


def _no_llava(adapter: Path, task: str) -> str:
    """What to do instead, where an adapter is of another task."""
    run = adapter.parent
    if task == COMMONSENSE:
        instead = f"{run / 'metrics.json'} holds the scores of its run's own test"
    else:
        instead = f"score {run / 'predictions'}/TASK.jsonl, its run's answers to its test records, with --predictions"
    return (
        f"{adapter} was trained as {task}, which is no LLaVA: {instead}; to run that test again, with RUN.yaml the "
        f"run's settings: python tasks/{task}.py --config RUN.yaml --training.output_dir {run} --test_only true"
    )
