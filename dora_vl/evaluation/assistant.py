"""Asks a decoder: an example's prompt, and the model's answers, choices or log-likelihoods."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isnan
from string import ascii_uppercase
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers.generation.streamers import BaseStreamer

from dora_vl.backbones.base import Features, max_positions
from dora_vl.backbones.encoder import Encoder
from dora_vl.backbones.frozen_outputs import NotStorable, PictureOutputCache
from dora_vl.backbones.generation import NO_TOKEN, NOT_YET_A_CHARACTER, NotFiniteScores, growing_text
from dora_vl.backbones.model import check_packing
from dora_vl.data.columns import Packing
from dora_vl.data.example import Example
from dora_vl.data.objects import asks_for_boxes
from dora_vl.data.samples import ALIGNED, BOOKKEEPING, IGNORED_LABEL, Sample, Skipped
from dora_vl.data.turns import Turn
from dora_vl.data.video import Uniform
from dora_vl.errors import BadSample
from dora_vl.evaluation.predictions import Prediction
from dora_vl.evaluation.predictor import Answered, Decoding, MediaReader, PromptMedia, View, Write, prediction
from dora_vl.evaluation.questions import endings_of, outputs_of, turns_asked
from dora_vl.shapes import Float, Int

log = logging.getLogger(__name__)
LEAST_REPEATED = 16
"""From this many questions about earlier pictures on, the proof that a tower can run apart pays."""


def inputs_on_device(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Returns the model's own inputs from a batch, on its device."""
    added = {"labels", *BOOKKEEPING}  # by a collator
    return dict(send_to_device({name: value for name, value in batch.items() if name not in added}, device))


def prompt_sample(encoder: Encoder, turns: Sequence[Turn], media: PromptMedia) -> Sample:
    """Encodes turns that end with a question, up to where the answer begins, without labels; never cut."""
    return Sample(**vars(encoder.encode_prompt(turns, media.pictures, media.videos)))


def answered_sample(encoder: Encoder, turns: Sequence[Turn], media: PromptMedia, answer: str) -> Sample:
    """Encodes a question with an answer, which is labelled with what closes it; never cut."""
    return Sample(**vars(encoder.encode_choice(turns, answer, media.pictures, media.videos)))


def ending_sample(encoder: Encoder, context: str, ending: str) -> Sample:
    """Encodes a context and, after a space, its ending, which alone is labelled; tokenised as lm-eval does."""
    ids, shared = (encoder.tokenizer(text)["input_ids"] for text in (f"{context} {ending}", context.rstrip()))
    labels = [*[IGNORED_LABEL] * len(shared), *ids[len(shared) :]]
    return Sample(torch.tensor(ids), torch.tensor(labels))


def prompt_batch(encoder: Encoder, samples: Sequence[Sample]) -> Mapping[str, Any]:
    """Makes a batch of prompts, padded on the left: their answers follow on the right."""
    return replace(encoder.collate, pad_side="left")(samples)


def growing_answer(encoder: Encoder) -> Callable[[Sequence[int]], str]:
    """Returns a decoder for the growing ids of one answer."""
    return growing_text(encoder.tokenizer, encoder.prompts.answer_in, encoder.box_tokens)


class _TextStreamer(BaseStreamer):
    """Passes on an answer's text as its tokens come, never half a character."""

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], object]) -> None:
        self._decode = decode
        self._write = write
        self._ids: list[int] = []
        self._written = ""
        self._has_begun = False

    def put(self, value: Tensor, *, is_last: bool = False) -> None:
        """Takes the next token; the first call brings the prompt, which is left out."""
        if not self._has_begun:
            self._has_begun = True
            return
        self._ids += value.flatten().tolist()
        text = self._decode(self._ids)
        if len(text) > len(self._written) and (is_last or not text.endswith(NOT_YET_A_CHARACTER)):
            self._write(text[len(self._written) :])
            self._written = text

    def end(self) -> None:
        self.put(torch.tensor([], dtype=torch.long), is_last=True)


def check_room(prompt_tokens: int, max_new_tokens: int, positions: int | None, sample_id: str) -> None:
    """Refuses a prompt that leaves no room for the longest answer among `positions`; None means no limit."""
    if positions is not None and prompt_tokens + max_new_tokens > positions:
        raise BadSample(
            sample_id,
            f"its prompt takes {prompt_tokens} tokens and its answer up to {max_new_tokens}, but the model has "
            f"{positions} positions; shorten it, or allow a shorter answer",
        )


@dataclass(frozen=True)
class QuestionSamples(Dataset["Sample | Skipped"]):
    """Encodes examples without labels; what cannot be asked comes back as `Skipped`."""

    examples: Sequence[Example]
    encoder: Encoder
    media: MediaReader
    max_new_tokens: int
    positions: int | None

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Sample | Skipped:
        example = self.examples[index]
        try:
            sample = prompt_sample(self.encoder, turns_asked(example), self.media.read(example))
            check_room(len(sample.input_ids), self.max_new_tokens, self.positions, example.id)
            return replace(sample, index=index, id=example.id, media=(*example.images, *example.videos))
        except BadSample as error:
            return Skipped(index, example.id, error.reason)


def by_picture(examples: Sequence[Example]) -> list[Example]:
    """Orders examples by their pictures, the longest prompts first, so that a lack of memory shows at once."""

    def length(example: Example) -> tuple[int, int, int]:
        return len(example.videos), len(example.images), sum(len(turn.text) for turn in turns_asked(example))

    groups: dict[object, list[Example]] = {}
    for example in sorted(examples, key=length, reverse=True):
        groups.setdefault((example.images, example.videos) if example.images else example.id, []).append(example)
    return [example for group in groups.values() for example in group]


@dataclass(frozen=True)
class Assistant:
    """Answers by a decoder and its encoder; a `Predictor`.

    `while_training`: the model goes on training afterwards, and autograd must be able to save what it made here.
    """

    backbone: Any
    encoder: Encoder
    while_training: bool = False

    def __post_init__(self) -> None:
        self.encoder.take_positions_of(self.backbone.model)

    def answer(
        self, example: Example, media: PromptMedia, *, max_new_tokens: int = 64, write: Write | None = None
    ) -> str:
        """See `Predictor`."""
        sample = prompt_sample(self.encoder, turns_asked(example), media)
        check_room(len(sample.input_ids), max_new_tokens, self.positions, example.id)
        options = {} if write is None else {"streamer": _TextStreamer(growing_answer(self.encoder), write)}
        batch = prompt_batch(self.encoder, [sample])
        (text,) = self.answers(batch, max_new_tokens=max_new_tokens, options=options)
        if text is None:
            raise NotFiniteScores
        return text

    def view(self, example: Example, *, frames: int) -> View:
        """Shows `frames` frames of the example's own clip."""
        if example.video is None:
            raise ValueError(f"example {example.id} has no video")
        as_pictures = self.encoder.no_videos_reason is not None
        return View(example=example, clip=example.video, sampling=Uniform(frames), as_pictures=as_pictures)

    def predict(self, examples: Sequence[Example], media: MediaReader, decoding: Decoding) -> Answered:
        """Answers examples of one picture together, so that it is read once."""
        ordered = by_picture(examples)
        if decoding.answer_method != "generation":
            yield from self._predict_by_likelihood(ordered, media, decoding)
            return
        items = QuestionSamples(ordered, self.encoder, media, decoding.max_new_tokens, self.positions)
        loader = DataLoader(items, batch_size=decoding.batch_size, collate_fn=list, num_workers=decoding.workers)
        once = self._picture_cache(ordered)
        for several in loader:
            samples = [item for item in several if isinstance(item, Sample)]
            skipped = [item for item in several if isinstance(item, Skipped)]
            batch_examples = [ordered[sample.index] for sample in samples]
            if once is not None:
                samples = once.replace_pixels(samples)
            texts = self.answers(self.begin_batch(samples), max_new_tokens=decoding.max_new_tokens) if samples else []
            answered = list[Prediction]()
            for example, sample, text in zip(batch_examples, samples, texts, strict=True):
                boxes = self.encoder.with_places(text, sample.sizes) if text and asks_for_boxes(example) else ""
                answered.append(prediction(example, text, boxes=boxes))
            yield answered + [prediction(ordered[item.index], None, item.reason) for item in skipped]

    def begin_batch(self, samples: Sequence[Sample]) -> Mapping[str, Any]:
        """Makes the batch of some prompts and reads their pictures, once for prompts with the same beginning."""
        beginnings = [(sample.media, *sample.input_ids[: sample.media_end].tolist()) for sample in samples]
        first = {beginning: sample for beginning, sample in zip(beginnings, samples, strict=True)}
        shared = all(sample.media_end for sample in samples) and len(first) < len(samples)
        if not shared or not self.backbone.continues_prompts:
            return prompt_batch(self.encoder, samples)
        begun = prompt_batch(self.encoder, [cut_prompt(sample, stop=sample.media_end) for sample in first.values()])
        rest = prompt_batch(self.encoder, [cut_prompt(sample, start=sample.media_end) for sample in samples])
        with self._no_grad():
            cache = self.backbone.read(**inputs_on_device(begun, self.device))
        order = torch.tensor([[*first].index(beginning) for beginning in beginnings])
        cache.batch_select_indices(order.to(self.device))
        names = ("input_ids", "attention_mask")
        return {**{name: torch.cat([begun[name][order], rest[name]], dim=1) for name in names}, "cache": cache}

    def _no_grad(self) -> contextlib.AbstractContextManager[Any]:
        return torch.no_grad() if self.while_training else torch.inference_mode()

    def _picture_cache(self, ordered: Sequence[Example]) -> PictureOutputCache | None:
        """Returns None if few pictures recur, or the family's vision parts cannot run separately."""
        shown = Counter(example.images for example in ordered if example.images)
        if self.while_training or shown.total() < LEAST_REPEATED + len(shown) or any(e.videos for e in ordered):
            return None
        try:
            return PictureOutputCache(self.backbone, self.encoder)
        except NotStorable as error:
            log.info("pictures are read anew for each question: %s", error)
            return None

    def _predict_by_likelihood(self, examples: Sequence[Example], media: MediaReader, decoding: Decoding) -> Answered:
        """Picks the likeliest of each question's texts, closed as an answer is; the first of equals."""
        once = self._picture_cache(examples)
        waiting: list[Sample] = []
        batch: list[tuple[Example, list[str], int]] = []

        def score_batch() -> list[Prediction]:
            size = decoding.batch_size
            given = waiting if once is None else once.replace_pixels(waiting)
            parts = [self.log_likelihoods(given[start : start + size]) for start in range(0, len(given), size)]
            scores = iter(torch.cat(parts).tolist())
            answered: list[Prediction] = []
            for example, texts, count in batch:
                likelihoods = [next(scores) for _ in range(count)]
                numbers = " ".join(map("{:.6f}".format, likelihoods))
                best = texts[likelihoods.index(max(likelihoods))] if texts else numbers
                answered.append(prediction(example, None if any(map(isnan, likelihoods)) else best))
            return answered

        for example in examples:
            try:
                if decoding.answer_method == "cloze":
                    pairs, texts = endings_of(example), []
                    samples = [ending_sample(self.encoder, context, ending) for context, ending in pairs]
                else:
                    texts = _letters(example) if decoding.answer_method == "letters" else outputs_of(example)
                    prompt_media = media.read(example)
                    samples = [
                        answered_sample(self.encoder, turns_asked(example), prompt_media, text) for text in texts
                    ]
                media_shown = (*example.images, *example.videos)
                samples = [replace(sample, id=example.id, media=media_shown) for sample in samples]
                check_room(max(len(sample.input_ids) for sample in samples), 0, self.positions, example.id)
            except BadSample as error:
                yield [prediction(example, None, error.reason)]
                continue
            if waiting and len(waiting) + len(samples) > decoding.batch_size:
                yield score_batch()
                waiting, batch = [], []
            waiting += samples
            batch.append((example, texts, len(samples)))
        if batch:
            yield score_batch()

    @property
    def positions(self) -> int | None:
        """Returns how many tokens the model takes, prompt and answer together."""
        return max_positions(self.backbone.config)

    def new_ids(
        self, batch: Mapping[str, Any], *, max_new_tokens: int, options: Mapping[str, Any] | None = None
    ) -> Int[Tensor, "batch new"]:
        """Generates ids after left-padded prompts, greedily unless `options` of generate say otherwise."""
        inputs = inputs_on_device(batch, self.device)
        with self._no_grad():
            return self.backbone.generate(**inputs, max_new_tokens=max_new_tokens, options=options).cpu()

    def answers(
        self, batch: Mapping[str, Any], *, max_new_tokens: int, options: Mapping[str, Any] | None = None
    ) -> list[str | None]:
        """Generates each prompt's answer; None where the scores were not finite."""
        ids = self.new_ids(batch, max_new_tokens=max_new_tokens, options=options)
        return [None if NO_TOKEN in answer.tolist() else self.encoder.decode(answer) for answer in ids]

    @cached_property
    def packing(self) -> Packing:
        """Says how samples with answers are packed: as trees, where the model follows them."""
        return check_packing(self.backbone, self.encoder, "trees")[0]

    @torch.inference_mode()
    def labelled(self, samples: Sequence[Sample], packing: Packing = "plain", *, keep_logits: bool = False) -> Features:
        """Computes hidden states and losses at the positions that predict labelled tokens."""
        batch = replace(self.encoder.collate, packing=packing)(samples)
        labels = batch["labels"].to(self.device)
        return self.backbone(**inputs_on_device(batch, self.device), labels=labels, keep_logits=keep_logits)

    @torch.inference_mode()
    def log_likelihoods(self, samples: Sequence[Sample]) -> Float[Tensor, " samples"]:
        """Computes the log-likelihood of each sample's labelled tokens."""
        features = self.labelled(samples, self.packing)
        sums = torch.zeros(len(samples), device=features.losses.device)
        return sums.index_add_(0, features.samples, -features.losses).cpu()

    def logits(
        self, example: Example, answer: str, media: MediaReader, decoding: Decoding
    ) -> Float[Tensor, "tokens vocab"]:
        """See `Predictor`; an empty answer has none."""
        try:
            sample = answered_sample(self.encoder, turns_asked(example), media.read(example), answer)
        except BadSample:
            return torch.zeros(0, 1)
        logits = self.labelled([sample], keep_logits=True).logits
        assert logits is not None
        return logits.float().cpu()

    @property
    def device(self) -> torch.device:
        """Returns the device of the weights."""
        module: nn.Module = self.backbone
        return next(module.parameters()).device


def cut_prompt(sample: Sample, *, start: int = 0, stop: int | None = None) -> Sample:
    """Returns some of a prompt's tokens; only the first ones come with its pictures."""
    inputs = {name: value[:, start:stop] if name in ALIGNED else value for name, value in sample.inputs.items()}
    if start:
        inputs = {name: value for name, value in inputs.items() if name in ALIGNED}
    stored = () if start else sample.stored
    return replace(
        sample, input_ids=sample.input_ids[start:stop], labels=sample.labels[start:stop], inputs=inputs, stored=stored
    )


def _letters(example: Example) -> list[str]:
    choices = len(example.choices)
    if not 0 < choices <= len(ascii_uppercase):
        raise BadSample(example.id, f"it has {choices} choices; letters are chosen among 1 to {len(ascii_uppercase)}")
    return [*ascii_uppercase[:choices]]
