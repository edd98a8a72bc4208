"""A VL-BART, ready to be asked: each question is one of its tasks', features are stored or computed on the way."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from string import ascii_uppercase

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dora_vl.backbones.feature_encoder import FeatureEncoder
from dora_vl.backbones.generation import NO_TOKEN, NotFiniteScores, says_true, without_broken
from dora_vl.backbones.pieces import Seq2SeqEncoder
from dora_vl.backbones.vision_store import FeatureReader, clip_of_features, fixed_length
from dora_vl.backbones.vlbart import VlBartBackbone
from dora_vl.data.example import Example
from dora_vl.data.pictures import open_image
from dora_vl.data.samples import IGNORED_LABEL
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.predictions import Prediction
from dora_vl.evaluation.predictor import Answered, Decoding, MediaReader, PromptMedia, View, Write, prediction
from dora_vl.evaluation.vlbart_tasks import MicroBatch, Seq2SeqCollator, Seq2SeqSample, Subtask, make_sample
from dora_vl.shapes import Float, Int

log = logging.getLogger(__name__)

CHOOSING = frozenset({"choice", "words"})
"""These ways to answer give the label of a choice, such as "a2"."""
TRUE, FALSE = "true", "false"
LONGEST_LABEL = 20
WITH_CHOICES = "a question with its choices (--choice, several times)"
FREE = "a question without choices"
CAPTION = 'for a caption (--question "")'


@dataclass(frozen=True, kw_only=True)
class VlBartAssistant:
    """A VL-BART with what turns words and pictures into its inputs; a `Predictor`.

    What it predicts is what the task's score takes: text, "true" or "false", or the label of a choice.

    Attributes:
        stored: by task, the stored features of what examples show; without them `features` computes them.
        feature_tokens: tokens of one picture, or of a whole video.
    """

    backbone: VlBartBackbone
    encoder: Seq2SeqEncoder
    subtasks: tuple[Subtask, ...]
    stored: Mapping[str, FeatureReader] = field(default_factory=dict)
    features: Mapping[str, FeatureEncoder] = field(default_factory=dict)
    feature_tokens: int = 0
    while_training: bool = False

    def view(self, example: Example, *, frames: int, task: str = "") -> View:
        """See `Predictor`: picks frames as the features' settings say, and states the part in the prompt."""
        subtask, video = self.subtask(example, task), example.video
        if subtask.state_span is not None and video is not None and "ts" not in example.extra:
            if video.start_seconds is None or video.end_seconds is None:
                raise _no_span(subtask)
            span = subtask.state_span(video.start_seconds, video.end_seconds)
            example = replace(example, extra={**example.extra, "ts": span})
        clip = clip_of_features(example)
        if clip is None or video is None:
            raise ValueError(f"example {example.id} has no video")
        return View(example=example, clip=clip[1], sampling=self._features_of(subtask).settings.sampling)

    def answer(
        self, example: Example, media: PromptMedia, *, max_new_tokens: int = 64, write: Write | None = None
    ) -> str:
        """See `Predictor`: answers one question, a choice in its words; the task's search sets the length."""
        if len(example.turns) > 1:
            raise UserError("a VL-BART reads one question at a time; ask without --conversation")
        subtask = self.subtask(example)
        sample = self.sample(example, subtask, media.frames or media.pictures)
        if sample.cut_tokens:
            log.warning(
                "the text is %d tokens too long for this model; the answer is about what was left", sample.cut_tokens
            )
        (text,) = self._texts(subtask, [example], [sample])
        if text is None:
            raise NotFiniteScores
        if subtask.answer_by in CHOOSING:
            text = example.choices[int(text.removeprefix("a"))]
        if write is not None:
            write(text)
        return text

    def predict(self, examples: Sequence[Example], media: MediaReader, decoding: Decoding) -> Answered:
        """See `Predictor`: keeps the questions' order; asks one at a time where it computes features."""
        size = decoding.batch_size if self.stored else 1
        for start in range(0, len(examples), size):
            predictions: list[Prediction] = []
            usable: list[tuple[Example, Subtask, Seq2SeqSample]] = []
            for example in examples[start : start + size]:
                try:
                    usable.append(self._read(example, media, decoding.task))
                except UserError as error:
                    reason = error.reason if isinstance(error, BadSample) else str(error)
                    predictions.append(prediction(example, None, reason))
            if usable:
                readable, subtasks, samples = zip(*usable, strict=True)
                subtask = subtasks[0]
                texts = self._texts(subtask, readable, samples)
                for example, sample, text in zip(readable, samples, texts, strict=True):
                    if text is not None and decoding.letters and subtask.answer_by in CHOOSING:
                        text = ascii_uppercase[int(text.removeprefix("a"))]
                    predictions.append(prediction(example, text, cut_tokens=sample.cut_tokens))
            yield predictions

    @torch.inference_mode()
    def logits(
        self, example: Example, answer: str, media: MediaReader, decoding: Decoding
    ) -> Float[Tensor, "tokens vocab"]:
        """See `Predictor`: returns the scores of a closed list's answers where the task has one."""
        example, subtask, sample = self._read(example, media, decoding.task)
        ids, mask, features = self._inputs(subtask, [sample])
        if subtask.answer_by == "closed":
            hidden = self.backbone.first_hidden(ids, mask, features)
            return self.backbone.answer_head(subtask.name)(hidden).float().cpu()
        text = example.choices[int(answer.removeprefix("a"))] if subtask.answer_by == "words" else answer
        labels = self.encoder.labels(text, max_tokens=LONGEST_LABEL)[0][None].to(ids.device)
        return self.backbone(ids, mask, labels, features, keep_logits=True).logits.float().cpu()

    def _read(self, example: Example, media: MediaReader, task: str) -> tuple[Example, Subtask, Seq2SeqSample]:
        """Returns the example as the model is asked it, its task, and its tensors."""
        subtask = self.subtask(example, task)
        if self.stored:
            sample = make_sample(example, subtask, encoder=self.encoder, reader=self.stored[subtask.name], target=None)
            return example, subtask, sample
        if example.video is None:
            pictures: Sequence[Image.Image] = [open_image(media.folder, path) for path in example.images]
        else:
            view = self.view(example, frames=0, task=task)
            example, pictures = view.example, media.frames(view.clip, view.sampling).pictures
        return example, subtask, self.sample(example, subtask, pictures)

    @torch.inference_mode()
    def sample(self, example: Example, subtask: Subtask, pictures: Sequence[Image.Image]) -> Seq2SeqSample:
        """Makes an example's tensors; computes the features of its pictures."""
        if not pictures:
            raise UserError("a VL-BART answers about pictures; give one")
        if subtask.state_span is not None and "ts" not in example.extra:
            raise _no_span(subtask)
        ids, cut = self.encoder.encode(subtask.prompt(example), max_tokens=subtask.input_tokens)
        encoder = self._features_of(subtask)
        if subtask.is_video:
            features = fixed_length(encoder.frames(pictures), self.feature_tokens, frames=len(pictures))[None]
        else:
            several = encoder.pictures(pictures)
            features = torch.stack([fixed_length(picture, self.feature_tokens, frames=1) for picture in several])
        if len(features) != subtask.images:
            raise UserError(f"{subtask.name} takes {subtask.images} pictures at a time, not {len(features)}")
        return Seq2SeqSample(example.id, ids, torch.full((1,), IGNORED_LABEL), features, 1.0, cut)

    def _inputs(self, subtask: Subtask, samples: Sequence[Seq2SeqSample]) -> tuple[Tensor, Tensor, Tensor]:
        batch = Seq2SeqCollator(self.encoder.pad_token_id, (0, 0))([MicroBatch(subtask, [*samples])])
        device = next(self.backbone.parameters()).device
        return batch["input_ids"].to(device), batch["attention_mask"].to(device), batch["features"].to(device)

    def _texts(
        self, subtask: Subtask, examples: Sequence[Example], samples: Sequence[Seq2SeqSample]
    ) -> list[str | None]:
        """Answers one batch, in the task's way; None where the model's scores are not finite."""
        with torch.no_grad() if self.while_training else torch.inference_mode():
            ids, mask, features = self._inputs(subtask, samples)
            if subtask.answer_by == "pair":
                return self._pairs(ids, mask, features)
            if subtask.answer_by == "closed":
                head = self.backbone.answer_head(subtask.name)
                scores = head(self.backbone.first_hidden(ids, mask, features))
                return without_broken(head.chosen(scores), scores)
            if subtask.answer_by == "choice":
                most = max(len(example.choices) for example in examples)
                labels = self._labels([f"a{index}" for index in range(most)])
                scores = self.backbone.likelihoods(ids, mask, features, labels)
                for number, example in enumerate(examples):
                    scores[number, len(example.choices) :] = float("-inf")
                return without_broken([f"a{index}" for index in scores.argmax(1).tolist()], scores)
            if subtask.answer_by == "words":  # each example has choices of its own
                texts: list[str | None] = []
                for number, example in enumerate(examples):
                    own, labels = slice(number, number + 1), self._labels(example.choices)
                    scores = self.backbone.likelihoods(ids[own], mask[own], features[own], labels)
                    texts += without_broken([f"a{int(scores.argmax(1))}"], scores)
                return texts
            search = subtask.search
            new = self.backbone.generate(
                ids,
                mask,
                features,
                max_length=search.max_length,
                num_beams=search.beams,
                no_repeat_ngram_size=search.no_repeat_ngram,
            )
            return [None if NO_TOKEN in answer.tolist() else self.encoder.decode(answer) for answer in new.cpu()]

    def _labels(self, texts: Sequence[str]) -> Int[Tensor, "choices answer"]:
        """Returns the ids of labels, -100 after the shorter ones."""
        labels = [self.encoder.labels(text, max_tokens=LONGEST_LABEL)[0] for text in texts]
        return pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL)

    def _pairs(self, ids: Tensor, mask: Tensor, features: Tensor) -> list[str | None]:
        """Compares the logits of "true" and "false" after the start and `<s>`.

        Where a small vocabulary spells one of them in pieces, the likelier of the two whole labels.
        """
        backbone = self.backbone
        true_token, false_token = self.encoder.first_token(TRUE), self.encoder.first_token(FALSE)
        if true_token is None or false_token is None:
            scores = backbone.likelihoods(ids, mask, features, self._labels((TRUE, FALSE)))
            return without_broken([TRUE if index == 0 else FALSE for index in scores.argmax(1).tolist()], scores)
        encoded, joint = backbone.encode(ids, mask, features)
        config = backbone.config
        begun = torch.tensor([[config.decoder_start_token_id, config.bos_token_id]], device=ids.device)
        logits = backbone.logits(backbone.decode(begun.expand(len(ids), -1), encoded, joint)[:, 1])
        chosen = says_true(logits, true_token=true_token, false_token=false_token)
        return without_broken([TRUE if is_true else FALSE for is_true in chosen.tolist()], logits)

    def subtask(self, example: Example, task: str = "") -> Subtask:
        """Returns the trained task of this name, or the first that such a question belongs to."""
        named = next((subtask for subtask in self.subtasks if subtask.name == task), None)
        if named is not None:
            return named
        form = CAPTION if not example.question.strip() else WITH_CHOICES if example.choices else FREE
        for subtask in self.subtasks:
            if form in _ways_to_ask(subtask):
                by_text = form == FREE and subtask.answer_by == "words"
                return replace(subtask, answer_by="text") if by_text else subtask
        names = ", ".join(subtask.name for subtask in self.subtasks)
        possible = dict.fromkeys(way for subtask in self.subtasks for way in _ways_to_ask(subtask))
        raise UserError(f"this model was trained for {names}; ask {' or '.join(possible)}")

    def _features_of(self, subtask: Subtask) -> FeatureEncoder:
        if subtask.name not in self.features:
            raise UserError(
                f"nothing says how the features of {subtask.name} were computed (data_prep.features did not make "
                f"them), so it cannot be asked about raw pictures; {', '.join(self.features)} can"
            )
        return self.features[subtask.name]


def _no_span(subtask: Subtask) -> UserError:
    return UserError(
        f"{subtask.name} was trained with the part of the video that is meant in its text; name it with --start and "
        "--end, in seconds"
    )


def _ways_to_ask(subtask: Subtask) -> tuple[str, ...]:
    """Returns the forms in which a user may ask this task."""
    if not subtask.reads_question:
        return (CAPTION,)
    return {"choice": (WITH_CHOICES,), "words": (WITH_CHOICES, FREE)}.get(subtask.answer_by, (FREE,))
