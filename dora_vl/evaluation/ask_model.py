"""A trained adapter as something that answers a benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

from torch import Tensor
from transformers.utils import logging as transformers_logging

from dora_vl.adapters.folder import RECIPE_FILE, WEIGHTS_FILE, read_json
from dora_vl.adapters.provenance import content_hash, local_folder
from dora_vl.backbones.base import max_positions
from dora_vl.backbones.image_text import IMAGE_TEXT
from dora_vl.backbones.vlbart_config import VlBartConfig
from dora_vl.data.examples import Clip, Example
from dora_vl.errors import UserError
from dora_vl.evaluation.ask import Asked, Asking, ask
from dora_vl.evaluation.ask_vlbart import VlBartModel, subtasks_of
from dora_vl.evaluation.assistant import Assistant, find_base, open_assistants
from dora_vl.evaluation.evaluation_set import EvaluationSet
from dora_vl.evaluation.predict import Decoding, predict
from dora_vl.evaluation.predictions_file import PredictionsFile, file_sha256
from dora_vl.evaluation.prompts import Prompt, turns_of
from dora_vl.evaluation.questions import Question
from dora_vl.evaluation.vlbart_assistant import VlBartAssistant, open_vlbart_assistants
from dora_vl.run.picture_reading import PictureReader, read_pixels
from dora_vl.vision.frame_sampling import Uniform
from dora_vl.vision.images import ImagePreparation
from dora_vl.vision.video import VideoReader

COMMONSENSE = "commonsense"
MIDDLE_FRAME = "middle_frame"
"""In an example's `extra`: the picture that LLaVA-1.5 takes for its video."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """An assistant and what tells it from others.

    Attributes:
        base_sha256: of the base's config and weights, wherever they are.
    """

    assistant: Assistant
    adapter_sha256: str
    base_sha256: str

    def ask(self, one: EvaluationSet, asking: Asking) -> Asked:
        """Puts a benchmark's questions, greedily and left-padded, to the model; what fails is named and counted."""
        prompt, failed = one.benchmark.prompt, dict(one.unreadable)
        examples = [with_middle_frame(example) for example in one.examples if example.id not in failed]
        preparation, folder = self.assistant.preparation, asking.pictures
        with VideoReader() as videos:
            answer_share = partial(
                self._answer,
                pictures=PictureReader(
                    pixels=partial(read_pixels, folder=folder, preparation=preparation),
                    frames=FrameReader(videos, folder, Uniform(asking.frames), preparation),
                ),
                decoding=Decoding(
                    batch_size=asking.batch_size,
                    max_new_tokens=asking.max_new_tokens,
                    workers=asking.workers,
                    max_positions=max_positions(self.assistant.backbone.config),
                ),
            )
            asked = ask(
                [question(example, prompt) for example in examples],
                answer_share,
                folder=asking.folder,
                settings={
                    **asking.settings(one, adapter_sha256=self.adapter_sha256, base_sha256=self.base_sha256),
                    "prompt": prompt.__name__ if isinstance(prompt, FunctionType) else repr(prompt),
                    **({"frames": asking.frames} if any(example.video for example in examples) else {}),
                },
            )
        return Asked(answers=asked.answers, failed=failed | asked.failed)

    def _answer(
        self, share: Sequence[Question], file: PredictionsFile, *, pictures: PictureReader, decoding: Decoding
    ) -> dict[str, str]:
        assistant = self.assistant
        return predict(assistant.backbone, assistant.encoder, share, pictures=pictures, file=file, decoding=decoding)


@dataclass(frozen=True)
class FrameReader:
    """A video's frames as the model takes pictures; it may be sent to data workers."""

    videos: VideoReader
    folder: Path
    sampling: Uniform
    preparation: ImagePreparation

    def __call__(self, clip: Clip) -> Sequence[Tensor]:
        """Frames `[3, height, width]`; raises `BadSample` for a video that cannot be read."""
        return self.videos.read_prepared(self.folder, clip, self.sampling, self.preparation.prepare).pictures


def with_middle_frame(example: Example) -> Example:
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
        video=example.video,
    )


def open_model(adapter: Path, *, base: str | None = None, any_base: bool = False) -> Model | VlBartModel:
    """The model of an adapter folder, quietly: a LLaVA or a VL-BART.

    Raises:
        UserError: the folder is incomplete, of another model, or its base is not there.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    recipe = read_json(adapter / RECIPE_FILE) if (adapter / RECIPE_FILE).is_file() else {}
    if recipe.get("task") == COMMONSENSE:
        raise UserError(_commonsense(adapter))
    if recipe.get("backbone") == IMAGE_TEXT:
        raise UserError(
            f"{adapter} is a {recipe.get('base')}'s: benchmarks are put to a LLaVA-1.5 or a VL-BART so far; ask it "
            f"with python tasks/image_qa.py --adapter {adapter}, or merge it (dora-vl merge) for another tool"
        )
    if recipe.get("backbone") == VlBartConfig.model_type:
        speaker: Assistant | VlBartAssistant = open_vlbart_assistants(
            adapter, subtasks_of, base=base, any_base=any_base
        ).adapted
    else:
        speaker = open_assistants(adapter, base=base, any_base=any_base).adapted
    hashes = {
        "adapter_sha256": file_sha256(adapter / WEIGHTS_FILE),
        "base_sha256": _base_sha256(adapter, recipe, base) if any_base else str(recipe["base_sha256"]),
    }
    if isinstance(speaker, VlBartAssistant):
        return VlBartModel(assistant=speaker, **hashes)
    return Model(assistant=speaker, **hashes)


def _base_sha256(adapter: Path, recipe: Mapping[str, Any], base: str | None) -> str:
    """The hash of a base that was not compared with the recipe's; by now it is on this disk."""
    place = find_base(base or recipe["base"], adapter)
    return content_hash(local_folder(place, None if base else recipe.get("revision")))


def _commonsense(adapter: Path) -> str:
    """What to do instead with a language model alone."""
    run = adapter.parent
    return (
        f"{adapter} was trained as {COMMONSENSE}, which takes no pictures: {run / 'metrics.json'} holds the scores of "
        "its run's own test; to run that again, with RUN.yaml the run's settings: python tasks/commonsense.py "
        f"--config RUN.yaml --training.output_dir {run} --test_only true"
    )
