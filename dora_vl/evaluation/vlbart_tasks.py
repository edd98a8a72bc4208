"""VL-BART's tasks on pictures and videos (VQAv2, GQA, NLVR2, TVQA, captions...), and the same on one's own data.

Prompts, labels, batch sizes and decoding are VL-Adapter's (arXiv 2112.06825), which the paper's runs take over. For
videos two differences from the published runs are on by default, and `metrics.json` names them: a text beyond 600
tokens loses subtitles, not its question (data.subtitles_first), and a choice is the likeliest label, not generated text
(evaluation.choice_by_likelihood). VALUE's test server is gone, so validation is what can be scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor

from dora_vl.backbones.pieces import Prompt, Seq2SeqEncoder
from dora_vl.backbones.vision_store import FeatureReader, check_features, feature_paths, features_of
from dora_vl.data.batches import SAMPLES, WEIGHTS
from dora_vl.data.example import Example, right_choice
from dora_vl.data.objects import asks_for_boxes
from dora_vl.data.samples import IGNORED_LABEL, Skipped
from dora_vl.errors import BadSample, short_repr
from dora_vl.evaluation.scores import caption, vqa
from dora_vl.evaluation.scores.exact import how2qa_score, video_score
from dora_vl.evaluation.scores.scored import Scored
from dora_vl.shapes import Float, Int

AnswerBy = Literal["text", "pair", "choice", "words", "closed"]
NormaliseBy = Literal["samples", "tokens"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """Holds what the decoder is to say, and the sample's weight; or the soft score of each right answer of a list."""

    text: str
    weight: float = 1.0
    soft_scores: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Search:
    """Says how an answer is decoded: greedy with one beam. `max_length` counts the start token."""

    beams: int = 1
    max_length: int = 20
    no_repeat_ngram: int = 0


@dataclass(frozen=True, kw_only=True)
class Subtask:
    """One task as data: everything that differs between tasks of one model.

    Attributes:
        batch_share: its batch as a multiple of the run's base batch, rounded down.
        target: what is trained on, given which answer the item is about (None: any of them may be drawn).
        each_answer: every answer is an item of its own.
        input_tokens: longest encoder text; None does not cut.
        normalise_by: `samples`: mean over a sample's tokens, then over the batch; `tokens`: mean over all tokens.
        answer_by: `text`: what is generated; `pair`: true or false by two logits; `choice`: the likeliest label;
            `words`: the likeliest of the example's choices, in their own words; `closed`: the best of a list.
        check_scoring: tells before training what `score` would miss; None tries `score` itself without answers.
        reads_question: the prompt holds the example's question; not so where pictures are described.
        chooses: every example has choices, and which of them is right is what is scored.
        is_video: a sample's pictures are the frames of one video, not inputs of their own.
        state_span: where the prompt states which part of the video it is about (and the features are of the whole),
            `extra["ts"]` for a part from one second to another; None where it states none.
    """

    name: str
    batch_share: float = 1.0
    prompt: Callable[[Example], Prompt]
    target: Callable[[Example, int | None, Random], Target]
    each_answer: bool = False
    input_tokens: int | None = None
    target_tokens: int = 20
    normalise_by: NormaliseBy = "samples"
    answer_by: AnswerBy = "text"
    search: Search = Search()
    score: Callable[[Sequence[Example], Mapping[str, str]], Scored]
    check_scoring: Callable[[Sequence[Example]], None] | None = None
    images: int = 1
    reads_question: bool = True
    chooses: bool = False
    is_video: bool = False
    state_span: Callable[[float, float], object] | None = None


def with_input_tokens(subtask: Subtask, tokens: int | None) -> Subtask:
    """Returns the task with another longest encoder text; None keeps its own."""
    return subtask if tokens is None else replace(subtask, input_tokens=tokens)


@dataclass(frozen=True)
class Seq2SeqSample:
    """One item in tensors; `features` is `[images, tokens, channels]`; `soft_scores` as its `Target` has them."""

    id: str
    input_ids: Int[Tensor, " seq"]
    labels: Int[Tensor, " answer"]
    features: Float[Tensor, "images tokens channels"]
    weight: float
    cut_tokens: int
    soft_scores: Mapping[str, float] | None = None


def make_sample(
    example: Example, subtask: Subtask, *, encoder: Seq2SeqEncoder, reader: FeatureReader, target: Target | None
) -> Seq2SeqSample:
    """Makes an example's tensors; without a target, as it is asked."""
    _check_kind(example, subtask)
    if asks_for_boxes(example):
        raise BadSample(example.id, "its answer holds boxes, which a VL-BART does not write")
    ids, cut = encoder.encode(subtask.prompt(example), max_tokens=subtask.input_tokens)
    features = features_of(example, reader)
    if target is None:
        return Seq2SeqSample(example.id, ids, torch.full((1,), IGNORED_LABEL), features, 1.0, cut)
    if target.soft_scores is None:
        labels, cut_of_label = encoder.labels(target.text, max_tokens=subtask.target_tokens)
        cut += cut_of_label
    else:
        labels = torch.zeros(1, dtype=torch.long)  # one place is scored, which counts as one label
    return Seq2SeqSample(example.id, ids, labels, features, target.weight, cut, target.soft_scores)


def check_sample(example: Example, subtask: Subtask, reader: FeatureReader) -> None:
    """Refuses what `make_sample` would, as far as it can be known without reading features."""
    _check_kind(example, subtask)
    check_features(example, reader)


def _check_kind(example: Example, subtask: Subtask) -> None:
    if subtask.chooses and not example.choices:
        raise BadSample(example.id, f"it has no choices; {subtask.name} asks which one is right")
    inputs = len(feature_paths(example))
    if inputs != subtask.images:
        raise BadSample(example.id, f"it has {inputs} pictures; {subtask.name} takes {subtask.images}")


@dataclass(frozen=True)
class ClosedBatch:
    """Says whose closed list of answers a batch is scored on, and the soft scores of each sample's right answers."""

    task: str
    soft_scores: Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class MicroBatch:
    """Says what one rank does in one micro-batch."""

    subtask: Subtask
    items: list[Seq2SeqSample | Skipped]


@dataclass(frozen=True)
class Seq2SeqCollator:
    """Makes the one micro-batch of a loader's batch, as the loss takes it.

    `sample_weights` add up to the mean weight of its usable samples; who has read all micro-batches of all ranks turns
    them into shares of the whole step (`over_step`). A micro-batch without any usable sample becomes one sequence of
    padding without labels, so that the ranks stay in step. `closed` is in it where a closed list is scored alone.
    """

    pad_token_id: int
    feature_shape: tuple[int, int]

    def __call__(self, batches: Sequence[MicroBatch]) -> dict[str, Any]:
        """Pads on the right; the features of all items have the same number of pictures."""
        (batch,) = batches
        samples = [item for item in batch.items if isinstance(item, Seq2SeqSample)]
        skipped = [(item.id, item.reason) for item in batch.items if isinstance(item, Skipped)]
        ids = [sample.input_ids for sample in samples] or [torch.tensor([self.pad_token_id])]
        labels = [sample.labels for sample in samples] or [torch.tensor([IGNORED_LABEL])]
        features = [sample.features for sample in samples]
        mask = _pad([torch.ones_like(text) for text in ids], 0)
        closed = {}
        if batch.subtask.answer_by == "closed":
            closed["closed"] = ClosedBatch(batch.subtask.name, [sample.soft_scores or {} for sample in samples] or [{}])
        return {
            **closed,
            "input_ids": _pad(ids, self.pad_token_id),
            "attention_mask": mask,
            "labels": _pad(labels, IGNORED_LABEL),
            "features": torch.stack(features or [torch.zeros(batch.subtask.images, *self.feature_shape)]),
            WEIGHTS: torch.tensor([sample.weight / len(samples) for sample in samples] or [0.0]),
            "normalise_by": batch.subtask.normalise_by,
            SAMPLES: len(samples),
            "sample_ids": [sample.id for sample in samples],
            "padding_tokens": mask.numel() - (sum(len(text) for text in ids) if samples else 0),
            "skipped": skipped,
            "cut": [(sample.id, sample.cut_tokens) for sample in samples if sample.cut_tokens],
        }


def _pad(tensors: Sequence[Tensor], value: int) -> Int[Tensor, "batch longest"]:
    return torch.nn.utils.rnn.pad_sequence(list(tensors), batch_first=True, padding_value=value)


# The tasks.

QUESTION_TOKENS, ANSWER_TOKENS, CAPTION_TOKENS = 20, 10, 40
NO_REPEAT = 3  # bart-base's setting, which the published runs kept
PUBLISHED_SEARCH = Search(beams=5, max_length=20, no_repeat_ngram=NO_REPEAT)

score_vqa = partial(vqa.vqa_score, version="before_2021")
"""Scores as VL-T5's `evaluate_raw`, which the paper's numbers are made with: the script of before 2021."""
score_gqa = partial(vqa.gqa_score, conversion="vl_t5")
"""Scores as VL-T5's `evaluate`, which the paper's numbers are made with: the generated text as it is."""


def all_subtasks(*, task_prompt: bool = True) -> Mapping[str, Subtask]:
    """Returns every task of a VL-BART, by its name."""
    return {**image_subtasks(task_prompt=task_prompt), **video_subtasks(task_prompt=task_prompt)}


def image_subtasks(*, task_prompt: bool = True) -> Mapping[str, Subtask]:
    """Returns every task on pictures; without `task_prompt` the text does not say which one it is."""

    def prompt_named(name: str) -> Callable[[Example], Prompt]:
        prefix = f"{name}: " if task_prompt else ""
        return lambda example: Prompt(text=prefix + example.question)

    vqav2 = Subtask(
        name="vqav2",
        prompt=prompt_named("vqa"),
        target=weighted_answer,
        input_tokens=QUESTION_TOKENS,
        target_tokens=ANSWER_TOKENS,
        search=Search(no_repeat_ngram=NO_REPEAT),
        score=score_vqa,
    )
    short_answer = Subtask(
        name="short_answer",
        prompt=prompt_named("vqa"),
        target=one_answer,
        input_tokens=QUESTION_TOKENS * 2,
        target_tokens=QUESTION_TOKENS,
        score=score_gqa,
    )
    # Sentences that are true or false of a picture, or of two.
    nlvr = Subtask(name="nlvr", prompt=prompt_named("nlvr"), target=truth, answer_by="pair", score=vqa.score_nlvr)
    coco_caption = Subtask(  # each of a picture's captions is an item of its own
        name="coco_caption",
        batch_share=50 / 60,
        prompt=lambda example: Prompt(text="caption: " if task_prompt else ""),
        target=own_caption,
        each_answer=True,
        input_tokens=CAPTION_TOKENS,
        target_tokens=CAPTION_TOKENS,
        normalise_by="tokens",
        search=PUBLISHED_SEARCH,
        score=caption.score,
        check_scoring=caption.check_scoring,
        reads_question=False,
    )
    tasks = (
        vqav2,
        # The prompt reads "gpa" in all published runs.
        replace(
            vqav2, name="gqa", batch_share=100 / 60, prompt=prompt_named("gpa"), target=one_answer, score=score_gqa
        ),
        short_answer,
        replace(nlvr, name="nlvr2", batch_share=20 / 60, score=vqa.nlvr2_score, images=2),
        nlvr,
        coco_caption,
    )
    return {task.name: task for task in tasks}


def weighted_answer(example: Example, answer: int | None, random: Random) -> Target:
    """Draws one of VQAv2's answers by their soft scores; the loss is multiplied by its score."""
    answers = [answer for answer in example.answers if answer.weight > 0 and answer.text.strip()]
    if not answers:
        raise BadSample(example.id, "it has no answer to train on")
    (drawn,) = random.choices(answers, weights=[answer.weight for answer in answers])
    return Target(text=drawn.text, weight=drawn.weight)


def one_answer(example: Example, answer: int | None, random: Random) -> Target:
    """Draws one of GQA's answers, which counts like any other."""
    return Target(text=weighted_answer(example, answer, random).text)


def truth(example: Example, answer: int | None, random: Random) -> Target:
    """Returns NLVR2's and NLVR's labels in lower case."""
    if not example.answers:
        raise BadSample(example.id, "it has no label to train on")
    if (label := example.answers[0].text.lower()) not in ("true", "false"):
        raise BadSample(example.id, f"its label is {short_repr(label)}, and this task answers true or false")
    return Target(text=label)


def own_caption(example: Example, answer: int | None, random: Random) -> Target:
    """Returns the caption, or description of a clip, that the item is about."""
    if not example.answers or not (text := example.answers[answer or 0].text).strip():
        raise BadSample(example.id, "it has no caption to train on")
    return Target(text=text)


def video_subtasks(*, task_prompt: bool = True) -> Mapping[str, Subtask]:
    """Returns every task on videos; without `task_prompt` the text does not say which one it is."""

    def task(name: str, text: Callable[[Example], str], target: Any, score: Any, **more: Any) -> Subtask:
        def prompt(example: Example) -> Prompt:
            # A space comes before what is said, even if nothing is, as published.
            subtitles = " " + " ".join(subtitle.text.strip() for subtitle in example.subtitles)
            ending = f" {name}: " if task_prompt else " "
            return Prompt(subtitles_before="[Subs]", subtitles=subtitles, text=text(example) + ending)

        sizes = {"input_tokens": 600, "target_tokens": 20}
        return Subtask(name=name, prompt=prompt, target=target, score=score, is_video=True, **sizes, **more)

    choosing: dict[str, Any] = {"answer_by": "choice", "search": PUBLISHED_SEARCH, "chooses": True}
    captioning: dict[str, Any] = {
        "each_answer": True,  # each of a clip's descriptions is an item of its own
        "search": PUBLISHED_SEARCH,
        "check_scoring": caption.check_scoring,
        "reads_question": False,
    }
    tasks = (
        task("tvqa", _choices, right_label, video_score, state_span=lambda a, b: f"{a:.10g}-{b:.10g}", **choosing),
        task(
            "how2qa", _choices, right_label, how2qa_score, state_span=lambda a, b: f"{float(a)}-{float(b)}", **choosing
        ),
        task("video_choice", _choices, right_label, video_score, **choosing),
        # Without the choices: what answers in words need not learn to look them up.
        task(
            "video_words",
            lambda example: f" [Q] {example.question.strip()}",
            lambda example, answer, random: Target(text=example.choices[right_choice(example)]),
            video_score,
            answer_by="words",
            chooses=True,
        ),
        task(
            "tvc",
            lambda example: f" [TS] ({example.extra.get('ts', '')})",
            own_caption,
            caption.score_value,
            state_span=lambda a, b: [float(a), float(b)],
            **captioning,
        ),
        task("yc2c", lambda _: "", own_caption, caption.score_value, **captioning),
        task("video_caption", lambda _: "", own_caption, caption.score_value, **captioning),
    )
    return {task.name: task for task in tasks}


def _choices(example: Example) -> str:
    """Returns question, part of the video and choices; each choice ends in exactly one period."""
    choices = " ".join(f"a{index}: {choice.strip(' .')}." for index, choice in enumerate(example.choices))
    return f" [Q] {example.question.strip()} [TS] ({example.extra.get('ts', '')}) [Choices] {choices}"


def right_label(example: Example, answer: int | None, random: Random) -> Target:
    """Returns the right choice's label, such as `a2`."""
    return Target(text=f"a{right_choice(example)}")


def closed(subtask: Subtask) -> Subtask:
    """Returns the task answered from a closed list instead of in words (VL-T5's classifier form)."""
    return replace(
        subtask,
        answer_by="closed",
        target=lambda example, answer, random: Target(text="", soft_scores=soft_scores(example)),
    )


def soft_scores(example: Example) -> dict[str, float]:
    """Returns each right answer's score, at most 1. Raises BadSample: none has a score above 0."""
    scores: dict[str, float] = {}
    for answer in example.answers:
        if answer.weight > 0 and answer.text.strip():
            scores[answer.text] = max(scores.get(answer.text, 0.0), min(answer.weight, 1.0))
    if not scores:
        raise BadSample(example.id, "it has no answer to train on")
    return scores
