"""A trained VL-BART, ready to be asked about pictures and frames: their features are computed on the way."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dora_vl.adapters.adapter import CLOSED_ANSWERS
from dora_vl.backbones.base import max_positions
from dora_vl.backbones.generation import NoNumbers
from dora_vl.backbones.loading import load_tokenizer
from dora_vl.backbones.pieces import Seq2SeqEncoder
from dora_vl.backbones.published_features import FeatureEncoder, open_encoders
from dora_vl.backbones.vision_store import clip_of_features, fixed_length
from dora_vl.backbones.vlbart import VlBartBackbone, load_vlbart, set_answer_heads
from dora_vl.data.example import Example
from dora_vl.data.turns import IMAGE_PLACEHOLDER, Turn
from dora_vl.data.video import Sampling
from dora_vl.errors import UserError
from dora_vl.evaluation.ask import Asking
from dora_vl.evaluation.asker import Asked, Opened, Shown, View, Write
from dora_vl.evaluation.open_model import ModelSource, with_adapter
from dora_vl.evaluation.questions import EvaluationSet
from dora_vl.evaluation.seq2seq_run import answers_of
from dora_vl.training.seq2seq_tasks import Subtask, with_input_tokens
from dora_vl.training.vlbart_tasks import closed

log = logging.getLogger(__name__)

FRAMES_TASK = "vlbart_video"
"""Whose older folders do not say that pictures are a video's frames."""
TASK_FILES = {"vlbart_image": "dora_vl.training.vlbart_tasks", "vlbart_video": "dora_vl.training.vlbart_tasks"}
CHOOSING = frozenset({"choice", "words"})
WITH_CHOICES = "a question with its choices (--choice, several times)"
FREE = "a question without choices"
CAPTION = 'for a caption (--question "")'


@dataclass(frozen=True)
class VlBartAssistant:
    """A VL-BART with what turns words and pictures into its inputs.

    Attributes:
        features: what computes each task's features, by its name; tasks whose features nobody can compute are left out.
        subtasks: those it was trained for, in the recipe's order.
        feature_tokens: tokens of one picture, or of a whole video.
        is_video: pictures are the frames of one video, not inputs of their own.
    """

    backbone: VlBartBackbone
    encoder: Seq2SeqEncoder
    features: Mapping[str, FeatureEncoder]
    subtasks: tuple[Subtask, ...]
    feature_tokens: int
    is_video: bool

    def view(self, example: Example, *, frames: int, task: str = "") -> View:
        """See `Asker.view`: what its features were trained on, whatever `frames` says.

        A question about a part of a video is as its task's records have it: where the prompt states the part, that is
        in it, and the features are of the whole file.

        Raises:
            UserError: no task fits, or nothing says how its features were computed, or the prompt needs a part and the
                example's video names none.
        """
        example = self._with_span(example, task)
        clip = clip_of_features(example)
        if clip is None or example.video is None:
            raise ValueError(f"example {example.id} has no video")
        return View(example=example, clip=clip[1], sampling=self.sampling(example, task))

    def _with_span(self, example: Example, task: str) -> Example:
        subtask, video = self._subtask(example, task), example.video
        if subtask.state_span is None or video is None or "ts" in example.extra:
            return example
        if video.start_seconds is None or video.end_seconds is None:
            raise _no_span(subtask)
        stated = subtask.state_span(video.start_seconds, video.end_seconds)
        return replace(example, extra={**example.extra, "ts": stated})

    def sampling(self, example: Example, task: str = "") -> Sampling:
        """Which frames of a video the task was trained on that such a question belongs to.

        Raises:
            UserError: no task fits, or nothing says how its features were computed.
        """
        return self._features_of(self._subtask(example, task)).settings.sampling

    def answer(
        self,
        turns: Sequence[Turn],
        pictures: Sequence[Image.Image],
        *,
        max_new_tokens: int = 64,
        write: Write | None = None,
    ) -> str:
        """See `Asker.answer`: to one question.

        Raises:
            UserError: there is more than one question, or no picture.
        """
        if len(turns) != 1:
            raise UserError("a VL-BART reads one question at a time; ask without --conversation")
        question = turns[0].text.replace(IMAGE_PLACEHOLDER, "").strip()
        return self.answer_example(
            Example(id="question", question=question),
            Shown(pictures=tuple(pictures)),
            max_new_tokens=max_new_tokens,
            write=write,
        )

    def answer_example(
        self, example: Example, seen: Shown, *, max_new_tokens: int = 64, write: Write | None = None
    ) -> str:
        """See `Asker.answer_example`: of the example's choices one, where it has some.

        Raises:
            UserError: as `said`.
        """
        said = self.said(example, seen.frames or seen.pictures)
        if self.answers_by_label(example):
            said = example.choices[int(said.removeprefix("a"))]
        if write is not None:
            write(said)
        return said

    @torch.inference_mode()
    def said(self, example: Example, pictures: Sequence[Image.Image], task: str = "") -> str:
        """What the task's score takes: text, "true" or "false", or the label of a choice, "a2".

        Args:
            task: the trained task by name; one that was not trained, or "", is told by the question's form.

        Raises:
            UserError: it was not trained for such a question, takes another number of pictures, or needs `extra["ts"]`.
            NoNumbers: its scores are none.
        """
        subtask, inputs = self.prepared(example, pictures, task)
        (answer,) = answers_of(self.backbone, self.encoder, subtask, [example], inputs)
        if answer is None:
            raise NoNumbers
        return answer

    def prepared(
        self, example: Example, pictures: Sequence[Image.Image], task: str = ""
    ) -> tuple[Subtask, tuple[Tensor, Tensor, Tensor]]:
        """The task that a question belongs to, and its ids, mask and features as a batch of one; see `said`."""
        if not pictures:
            raise UserError("a VL-BART answers about pictures; give one")
        subtask = self._subtask(example, task)
        if subtask.state_span is not None and "ts" not in example.extra:
            raise _no_span(subtask)
        device = next(self.backbone.parameters()).device
        ids, cut = self.encoder.encode(subtask.prompt(example), max_tokens=subtask.input_tokens)
        if cut:
            log.warning("the text is %d tokens too long for this model; the answer is about what was left", cut)
        features = self.inputs(pictures, subtask).to(device)
        if features.shape[1] != subtask.images:
            raise UserError(f"{subtask.name} takes {subtask.images} pictures at a time, not {features.shape[1]}")
        return subtask, (ids[None].to(device), torch.ones_like(ids)[None].to(device), features)

    def ask(self, one: EvaluationSet, asking: Asking) -> Asked:
        """See `Asker.ask`: as in training."""
        from dora_vl.evaluation.ask_vlbart import ask_vlbart

        return ask_vlbart(self, one, asking)

    def answers_by_label(self, example: Example, task: str = "") -> bool:
        """Whether `said` gives the label of a choice."""
        return self._subtask(example, task).answer_by in CHOOSING

    def _subtask(self, example: Example, task: str = "") -> Subtask:
        """The trained task that such a question belongs to; one that learnt words, not labels, needs no choices."""
        named = next((one for one in self.subtasks if one.name == task), None)
        if named is not None:
            return named
        wanted = CAPTION if not example.question.strip() else WITH_CHOICES if example.choices else FREE
        for one in self.subtasks:
            if wanted in _ways_to_ask(one):
                return replace(one, answer_by="text") if wanted == FREE and one.answer_by == "words" else one
        known = ", ".join(one.name for one in self.subtasks)
        possible = dict.fromkeys(way for one in self.subtasks for way in _ways_to_ask(one))
        raise UserError(f"this model was trained for {known}; ask {' or '.join(possible)}")

    def _features_of(self, subtask: Subtask) -> FeatureEncoder:
        if subtask.name not in self.features:
            raise UserError(
                f"nothing says how the features of {subtask.name} were computed (data_prep.features did not make "
                f"them), so it cannot be asked about raw pictures; {', '.join(self.features)} can"
            )
        return self.features[subtask.name]

    def inputs(
        self, pictures: Sequence[Image.Image], subtask: Subtask
    ) -> Float[Tensor, "one pictures tokens channels"]:
        """What the model reads of the pictures for a task; the frames of a video are one."""
        encoder = self._features_of(subtask)
        if not self.is_video:
            inputs = [fixed_length(one, self.feature_tokens, frames=1) for one in encoder.pictures(pictures)]
            return torch.stack(inputs)[None]
        return fixed_length(encoder.frames(pictures), self.feature_tokens, frames=len(pictures))[None, None]


def _no_span(subtask: Subtask) -> UserError:
    return UserError(
        f"{subtask.name} was trained with the part of the video that is meant in its text; name it with --start and "
        "--end, in seconds (tasks/video_qa.py)"
    )


def _ways_to_ask(subtask: Subtask) -> tuple[str, ...]:
    """What a person may type for this task."""
    if not subtask.reads_question:
        return (CAPTION,)
    return {"choice": (WITH_CHOICES,), "words": (WITH_CHOICES, FREE)}.get(subtask.answer_by, (FREE,))


def subtasks_of(task: str, *, task_prompt: bool) -> Mapping[str, Subtask]:
    """Every task of a VL-BART task file, by the file's name; `task_prompt` as in training.

    Raises:
        UserError: no such task file.
    """
    if task not in TASK_FILES:
        raise UserError(f"the adapter was trained by {task!r}; there are {', '.join(TASK_FILES)}")
    return import_module(TASK_FILES[task]).subtasks(task_prompt=task_prompt)


def open_vlbart(source: ModelSource, *, merged: bool = False) -> Opened:
    """Builds the VL-BART that an adapter folder's `recipe.json` describes.

    Args:
        merged: the source's place holds the adapter's change already, so that nothing is loaded onto it.

    Raises:
        UserError: a vision tower is not there or another one, or nothing says how the features were computed.
    """
    wanted, recipe, place = source.wanted, source.recipe, source.place
    adapter = Path(str(wanted.adapter))
    loaded = load_vlbart(place, dtype=getattr(torch, source.dtype), attn_implementation=source.attention)
    lists, of_base = recipe.get(CLOSED_ANSWERS, {}), set(loaded.config.closed_answers)
    if wanted.strength != 1 and set(lists) - of_base:
        raise UserError(f"--strength: {adapter} answers from lists that its base does not have; leave it out")
    if not merged:
        set_answer_heads(loaded.model, lists)
    change = None if merged else adapter
    adapted, plain = with_adapter(loaded, change, with_base=wanted.with_base, strength=wanted.strength)
    trained_with = recipe["settings"]
    device = next(adapted.parameters()).device
    encoders = open_encoders(adapter, recipe, device=device, any_tower=wanted.any_base)
    known = subtasks_of(recipe["task"], task_prompt=trained_with["task_prompt"])
    own = [with_input_tokens(known[name], trained_with.get("input_tokens")) for name in recipe["tasks"]]

    def answered(heads: Collection[str]) -> tuple[Subtask, ...]:
        return tuple(closed(one) if one.name in lists and one.name in heads else one for one in own)

    first = VlBartAssistant(
        backbone=adapted,
        encoder=Seq2SeqEncoder(
            load_tokenizer(place),
            subtitles_first=trained_with["subtitles_first"],
            max_positions=max_positions(adapted.config),
        ),
        features=encoders,
        subtasks=answered(lists),
        feature_tokens=recipe["feature_tokens"],
        is_video=bool(recipe.get("is_video", recipe["task"] == FRAMES_TASK)),
    )
    # Without the adapter a task is answered in words, unless the base brought a head of its own.
    without = None if plain is None else replace(first, backbone=plain, subtasks=answered(of_base))
    return Opened(adapted=first, base=without)
