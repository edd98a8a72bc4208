"""Turns conversations, pictures and videos into any model's processor inputs, with labels on the answers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers.models.auto.processing_auto import AutoProcessor
from transformers.processing_utils import ProcessorMixin

from dora_vl.backbones.base import config_of, max_positions, model_type_of, sees_pictures
from dora_vl.backbones.families.boxes import BoxFormat, boxes_of, made_by
from dora_vl.backbones.families.formats import PROBE, VIDEO_MARK, Chat, Instruction, Prompts, shared_beginning
from dora_vl.backbones.families.table import LLAVA, quirks_of
from dora_vl.backbones.generation import decoded
from dora_vl.backbones.loading import load_tokenizer
from dora_vl.backbones.packed_attention import OwnPositions
from dora_vl.backbones.pieces import STAND_IN, PieceProcessor, from_offsets
from dora_vl.backbones.prompts import prompts_of
from dora_vl.backbones.specs import TrainOn
from dora_vl.backbones.towers import Aspect, ImagePreparation
from dora_vl.backbones.video_inputs import (
    ONE_LENGTH,
    Video,
    as_pictures,
    displaced_inputs,
    grey_video,
    has_place_for_video,
    marked,
    repeated,
    video_arguments,
)
from dora_vl.data.batches import Collator
from dora_vl.data.example import Example
from dora_vl.data.objects import Box, Size, place_of, with_places
from dora_vl.data.samples import ALIGNED, IGNORED_LABEL, Encoded, Sample, TrainedAnswer
from dora_vl.data.turns import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Turn
from dora_vl.errors import BadSample, UserError, one_line
from dora_vl.files import NO_OWN_CODE, opening
from dora_vl.shapes import Int

DUMMY_SIDE = 64
GREY = (127, 96, 63)
"""The dummy picture has this colour; families that drop pictures of zeros would take a black one for padding."""


def placeholder_picture(size: tuple[int, int]) -> Image.Image:
    """Makes a picture in place of one whose outputs are stored."""
    picture = Image.new("RGB", size, GREY)
    picture.info[STAND_IN] = True
    return picture


def _media_up_to(answer: int, turns: Sequence[Turn]) -> tuple[int, int]:
    """Counts the pictures and videos that the turns show before the answer of this number."""
    end = [number for number, turn in enumerate(turns) if turn.role == "assistant"][answer]
    text = "".join(turn.text for turn in turns[:end] if turn.role != "assistant")
    return text.count(IMAGE_PLACEHOLDER), text.count(VIDEO_PLACEHOLDER) + text.count(VIDEO_MARK)


def open_encoder(  # noqa: PLR0913 - settings of a run
    base: str,
    *,
    template: str | None = None,
    train_on: TrainOn = "all",
    aspect: Aspect = "pad",
    max_tokens: int,
    revision: str | None = None,
    thinking: bool | None = None,
    boxes: str | None = None,
) -> Encoder:
    """Opens the encoder of a folder or hub id; no weights are read, and the options mean what a run's settings do."""
    processor = load_processor(base, aspect=aspect, revision=revision)
    pictures = sees_pictures(base, revision)
    prompts = prompts_of(processor, base, template, pictures=pictures, train_on=train_on, thinking=thinking)
    positions = max_positions(config_of(base, revision))
    form = boxes_of(processor, boxes)
    return Encoder(processor, prompts, max_tokens=max_tokens, max_positions=positions, boxes=form)


def load_processor(base: str, *, aspect: Aspect = "pad", revision: str | None = None) -> Any:
    """Opens the processor of a folder or hub id; a LLaVA-1.5 or language model gets one made of its tokenizer."""
    if not sees_pictures(base, revision):
        return PieceProcessor(load_tokenizer(base, revision=revision))
    if model_type_of(base, revision) == LLAVA:
        config = config_of(base, revision)
        preparation = ImagePreparation.from_folder(base, aspect=aspect, revision=revision)
        size, taken = preparation.preparation.image_size, int(config.to_dict()["vision_config"]["image_size"])
        if size != taken:
            raise UserError(
                f"{base}: its processor makes pictures of {size} x {size} pixels, its tower takes {taken} x "
                f"{taken}; put the processor's file there that belongs to the tower"
            )
        return PieceProcessor(
            load_tokenizer(base, revision=revision),
            pixels=preparation.prepare,
            tokens_per_image=config.image_seq_length,
            image_token_id=config.image_token_id,
            preparation=preparation.fingerprint(),
        )
    with opening(f"no processor could be read from {base!r}"):
        processor = AutoProcessor.from_pretrained(base, revision=revision or "main", **NO_OWN_CODE)
    if not isinstance(processor, ProcessorMixin):
        raise UserError(f"{base!r} has no processor (processor_config.json), which prepares its pictures")
    return processor


LONGEST_TOKEN = 256
"""Characters of a token at most: the longest that vocabularies have are 128 spaces."""


class Encoder:
    """Makes processor inputs and labels of turns, pictures and videos; it holds no model and can be pickled.

    The template's text and the pictures go to the processor together, so pictures become as many tokens as the family
    makes of their size. So do videos' frames, with their times; families without videos (`no_videos_reason`)
    get the frames as pictures. The processor's outputs are unchanged, except that a long text is truncated at its end.

    Args:
        max_tokens: a longer sample loses text at its end; pictures are never cut.
        max_positions: the model's positions; None if it states no number.
        boxes: how boxes are written; None is as the processor's models were taught.
    """

    def __init__(
        self,
        processor: Any,
        prompts: Prompts,
        *,
        max_tokens: int,
        max_positions: int | None = None,
        boxes: BoxFormat | None = None,
    ) -> None:
        self.processor = processor
        self.prompts = prompts
        self.tokenizer = processor.tokenizer
        self.quirks = quirks_of(processor)
        self.max_positions = max_positions
        self.max_tokens = min(max_tokens, max_positions or max_tokens)
        self.sees_pictures = not isinstance(processor, PieceProcessor) or processor.pixels is not None
        self.boxes = boxes or boxes_of(processor)
        self.own_positions: OwnPositions | None = None
        """`take_positions_of` sets it for a family that counts along several axes."""

    @property
    def collate(self) -> Collator:
        """Returns what joins samples as the model's family takes them.

        Padding is masked, so any id does where the tokenizer has none for it.
        """
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return Collator(int(next(token for token in ids if token is not None)), join=self.quirks.join)

    @functools.cached_property
    def tokens_per_image(self) -> int:
        """Counts the tokens of the dummy picture and the words beside it; 0 if the model sees no pictures."""
        if isinstance(self.processor, PieceProcessor):
            return self.processor.tokens_per_image
        return len(self.dummy().input_ids)

    @functools.cached_property
    def no_videos_reason(self) -> str | None:
        """Says why videos go in as pictures; None if the family takes videos."""
        processor = vars(self.processor)
        if processor.get("video_processor") is None:
            return f"{type(self.processor).__name__} has no video processor"
        token = processor.get("video_token")
        if not isinstance(token, str) or not has_place_for_video(self.prompts.render, token):
            return "the chat template has no place for a video"
        return None

    @functools.cached_property
    def videos_of_one_length(self) -> bool:
        """Tells whether all videos of a batch must have equally many frames."""
        if self.no_videos_reason:
            return False
        frames = self.dummy_video().inputs.get(ONE_LENGTH)
        return frames is not None and frames.dim() == 5

    @functools.cached_property
    def cannot_mix_media(self) -> bool:
        """Tells whether a batch may not mix pictures and videos: they share one token but not their inputs (GLM)."""
        if self.no_videos_reason:
            return False
        video = self.dummy_video()
        own = frozenset(self.dummy().inputs).difference(ALIGNED)
        picture_token = self.tokenizer.convert_tokens_to_ids(self.processor.image_token)
        return own.isdisjoint(video.inputs) and bool((video.input_ids == picture_token).any())

    @functools.cached_property
    def _lengths_must_agree(self) -> bool:
        """Tells whether the processor refuses a sample with videos of several lengths."""
        videos = [grey_video(GREY, DUMMY_SIDE, frames) for frames in (2, 3)]
        turns = marked([Turn("user", f"{VIDEO_PLACEHOLDER}\n" * len(videos) + ".")])
        try:
            self._process(self.prompts.render(turns, generation_prompt=True), (), videos, "dummy")
        except BadSample:
            return True
        return False

    def encode(
        self, conversation: Example, pictures: Sequence[Image.Image] = (), videos: Sequence[Video] = ()
    ) -> Encoded:
        """Encodes a whole conversation, whose `<image>` and `<video>` stand for the pictures and videos in their order.

        Labels are -100 except on answers and what closes them. Raises BadSample: the turns do not fit the template, a
        picture would be cut, or no answer is left.
        """
        characters = max(len(turn.text) for turn in conversation.turns)
        if characters > self.max_tokens * LONGEST_TOKEN:  # tokenizers take gigabytes, or end the process
            more = f"more than {self.max_tokens} tokens can hold; shorten it, or raise data.max_tokens"
            raise BadSample(conversation.id, f"one of its texts has {characters:,} characters, {more}")
        rounds = self._processed(conversation.turns, pictures, videos, conversation.id)
        end, longest = max(text.media_end for text in rounds), max(len(text.input_ids) for text in rounds)
        if end > self.max_tokens:
            what = f"{len(pictures)} pictures" + (f" and {len(videos)} videos" if videos else "")
            fewer = "take fewer frames (data.video_frames)" if videos else "have the processor make fewer of a picture"
            raise BadSample(
                conversation.id,
                f"its {what} and the text before the last one take {end} tokens of "
                f"{self.max_tokens}; raise data.max_tokens, or {fewer}",
            )
        kept: list[Encoded] = []
        for text in rounds:
            ids, labels = text.input_ids[: self.max_tokens], text.labels[: self.max_tokens]
            if not bool((labels != IGNORED_LABEL).any()):
                continue
            inputs = {name: value[:, : len(ids)] if name in ALIGNED else value for name, value in text.inputs.items()}
            images, clips = _media_up_to(text.answers[-1], conversation.turns)
            media = (*conversation.images[:images], *conversation.videos[:clips])
            positions = self.own_positions and self.own_positions.of(ids, inputs)
            kept.append(replace(text, input_ids=ids, labels=labels, inputs=inputs, positions=positions, media=media))
        cut = max(0, longest - self.max_tokens)
        if not kept:
            raise BadSample(conversation.id, f"no answer is left to train on after {cut} of {longest} tokens were cut")
        return replace(kept[0], cut_tokens=cut, others=tuple(kept[1:]))

    def answers(self, conversation: Example) -> list[TrainedAnswer]:
        """Lists what the labels of a conversation must decode to."""
        question = PROBE[0] if self.sees_pictures else replace(PROBE[0], text=PROBE[0].text.removeprefix("<image>\n"))
        if isinstance(self.prompts, Instruction):  # its labels may hold the question too
            question = next(turn for turn in conversation.turns if turn.role == "user")
        question = replace(question, more=conversation.turns[0].more)

        def labelled_text(turn: Turn) -> TrainedAnswer:
            """Finds what labels hold around an answer, by rendering a known one in its place; of calls all of it."""
            if not turn.is_trained:
                return TrainedAnswer("", turn.text, "")
            _, answer = self.prompts.thought_and_answer(turn.text)
            known = replace(turn, text=turn.text.removesuffix(answer) + PROBE[1].text)
            chat = self.prompts.render([question, turn if turn.more else known])
            if chat.suffix is not None:  # the processor closes it
                probe = chat.suffix + self.tokenizer.eos_token
            else:
                start, end = chat.answer_spans[0]
                begin = self.processor.begin_text if start == 0 and isinstance(self.processor, PieceProcessor) else ""
                probe = begin + chat.text[start:end]
            if turn.more:
                return TrainedAnswer("", probe, "")
            before, _, after = probe.rpartition(PROBE[1].text)
            return TrainedAnswer(before, answer, after)

        return [labelled_text(turn) for turn in conversation.turns if turn.role == "assistant"]

    def encode_prompt(
        self, turns: Sequence[Turn], pictures: Sequence[Image.Image] = (), videos: Sequence[Video] = ()
    ) -> Encoded:
        """Encodes turns that end with a question, up to where the answer begins, without labels; never cut."""
        (encoded,) = self._processed(turns, pictures, videos, "question", generation_prompt=True)
        return encoded

    def encode_choice(
        self, turns: Sequence[Turn], choice: str, pictures: Sequence[Image.Image] = (), videos: Sequence[Video] = ()
    ) -> Encoded:
        """Encodes turns and an answer, of which only the answer has labels. Raises BadSample: it would be cut."""
        answered = (*turns, Turn("assistant", choice))
        encoded, *_ = self._processed(answered, pictures, videos, "question", prompts=self.prompts.in_test())
        length, most = len(encoded.input_ids), self.max_positions
        if most is not None and length > most:
            reason = f"with its answer {choice!r:.60} it takes {length} tokens; the model has {most} positions"
            raise BadSample("question", reason)
        labels = encoded.labels.clone()
        trained = labels != IGNORED_LABEL
        others = (~trained[: int(trained.nonzero()[-1]) + 1]).nonzero()  # what comes before the last answer
        labels[: int(others[-1]) + 1 if len(others) else 0] = IGNORED_LABEL
        positions = self.own_positions and self.own_positions.of(encoded.input_ids, encoded.inputs)
        return replace(encoded, labels=labels, positions=positions, answers=())

    def encode_answers(
        self, conversation: Example, pictures: Sequence[Image.Image] = (), videos: Sequence[Video] = ()
    ) -> Encoded:
        """Encodes a conversation's last answer, and the rejected ones as `others`, never cut. Raises BadSample."""
        *turns, last = conversation.turns
        media, encoded = (*conversation.images, *conversation.videos), []
        first = -1.0 if conversation.is_good is False else 1.0
        for weight, text in ((first, last.text), *((-1.0, text) for text in conversation.rejected)):
            try:
                answer = self.encode_choice(turns, text, pictures, videos)
            except BadSample as error:
                raise BadSample(conversation.id, error.reason) from None
            if len(answer.input_ids) > self.max_tokens:
                reason = f"with its answer {text!r:.60} it takes {len(answer.input_ids)} tokens of {self.max_tokens}"
                raise BadSample(conversation.id, f"{reason}; raise data.max_tokens: answers are not cut")
            encoded.append(replace(answer, media=media, weight=weight))
        return replace(encoded[0], others=tuple(encoded[1:]))

    def take_positions_of(self, model: nn.Module) -> None:
        """Gives later samples the model's own positions along several axes; a skeleton model suffices."""
        if self.sees_pictures:
            dummy = self.dummy()
            self.own_positions = OwnPositions.by_sample(model, dummy.input_ids, dummy.inputs)

    def dummy(self, side: int = DUMMY_SIDE) -> Sample:
        """Makes a sample of one small picture without labels; it takes a text-only batch through the vision part."""
        return self.media_sample([Image.new("RGB", (side, side), GREY)])

    @functools.cached_property
    def size_matters(self) -> bool:
        """Tells whether a larger picture becomes more tokens, or more pixels for the model."""
        if not self.sees_pictures:
            return False
        sizes: set[tuple[int, int]] = set()
        for row in (self.dummy(), self.dummy(1024)):  # every dynamic resolution makes more of 1024
            tensors = [value for name, value in row.inputs.items() if name not in ALIGNED and isinstance(value, Tensor)]
            sizes.add((len(row.input_ids), sum(tensor.numel() for tensor in tensors)))
        return len(sizes) > 1

    def dummy_video(self, frames: int = 2) -> Sample:
        """Makes a sample of one small video without labels."""
        return self.media_sample(videos=[grey_video(GREY, DUMMY_SIDE, frames)])

    def media_sample(self, pictures: Sequence[Image.Image] = (), videos: Sequence[Video] = ()) -> Sample:
        """Makes a sample that shows these, without a label. Raises BadSample: the family cannot take them together."""
        shown = f"{IMAGE_PLACEHOLDER}\n" * len(pictures) + f"{VIDEO_PLACEHOLDER}\n" * len(videos)
        sample = Sample(**vars(self.encode_prompt((Turn("user", f"{shown}."),), pictures, videos)), id="dummy")
        positions = self.own_positions and self.own_positions.of(sample.input_ids, sample.inputs)
        return replace(sample, positions=positions)

    def decode(self, ids: Int[Tensor, " seq"] | Sequence[int]) -> str:
        """Decodes an answer, without special tokens and what ends it."""
        return self.prompts.answer_in(decoded(self.tokenizer, ids, self.box_tokens))

    @functools.cached_property
    def box_tokens(self) -> frozenset[int]:
        """Returns the ids of the special tokens that boxes are written with, which an answer's text keeps."""
        return frozenset(map(self.tokenizer.convert_tokens_to_ids, self.boxes.tokens))

    @functools.cached_property
    def made(self) -> Callable[[Size], Size]:
        """Says which size the processor makes of a picture."""
        return made_by(self.processor)

    def with_boxes(self, turns: Sequence[Turn], pictures: Sequence[Image.Image]) -> Sequence[Turn]:
        """Returns the turns with their boxes as the family writes them. Raises ValueError: a box has no picture."""
        sizes = [picture.size for picture in pictures]

        def write(boxes: Sequence[Box]) -> str:
            if beyond := [box for box in boxes if not 0 <= box.image < len(sizes)]:
                raise ValueError(f"the {beyond[0].named()} is of picture {beyond[0].image + 1} of {len(sizes)}")
            return self.boxes.write([box.in_fractions(sizes[box.image]) for box in boxes], sizes, self.made)

        return [replace(turn, text=with_places(turn.text, write)) for turn in turns]

    def with_places(self, answer: str, sizes: Sequence[Size]) -> str:
        """Returns what an answer says of its first picture as `data.objects` writes boxes; itself where it has none."""
        boxes = self.boxes_in(answer, sizes[0]) if sizes else []
        return place_of(boxes) if boxes else answer

    def boxes_in(self, answer: str, size: Size, image: int = 0) -> list[Box]:
        """Reads the boxes of an answer about a picture of this size, in fractions of it."""
        return self.boxes.read(answer, size, self.made, image)

    def _processed(
        self,
        turns: Sequence[Turn],
        pictures: Sequence[Image.Image],
        videos: Sequence[Video],
        sample: str,
        *,
        generation_prompt: bool = False,
        prompts: Prompts | None = None,
    ) -> list[Encoded]:
        """Processes each text of a conversation, that of its last answer first."""
        placeholders = ((IMAGE_PLACEHOLDER,) if pictures else ()) + ((VIDEO_PLACEHOLDER,) if videos else ())
        try:
            written = self.with_boxes(turns, pictures) if any("<objects>" in turn.text for turn in turns) else ()
            turns = written or turns
            # Unicode's noncharacters serve as marks here (`BREAK`, `VIDEO_MARK`, stand-ins).
            if any(0xFDD0 <= ord(character) <= 0xFDEF for turn in turns for character in turn.text + turn.more):
                raise ValueError("its text holds a Unicode noncharacter (U+FDD0 to U+FDEF)")
            if any(token in turn.text for turn in turns if turn.role == "assistant" for token in placeholders):
                raise ValueError("an answer holds a picture's or a video's place, and this model answers in words")
            if videos and self.no_videos_reason:
                turns, pictures = as_pictures(turns, pictures, videos)
                videos = ()
            if not self.sees_pictures and (pictures or any(IMAGE_PLACEHOLDER in turn.text for turn in turns)):
                raise ValueError("it has pictures or videos, which a language model does not see")
            longest = max((len(video.pictures) for video in videos), default=0)
            if any(len(video.pictures) < longest for video in videos) and self._lengths_must_agree:
                videos = [repeated(video, longest) for video in videos]
            turns = marked(turns) if videos else turns
            chat = (prompts or self.prompts).render(turns, generation_prompt=generation_prompt)
        except ValueError as error:
            raise BadSample(sample, str(error)) from error
        rows = (chat, *chat.others)
        seen = [_media_up_to(row.answers[-1], turns) if row.answers else (None, None) for row in rows]
        media = [(pictures[:images], videos[:clips]) for images, clips in seen]
        encoded = [self._process(row, *shown, sample) for row, shown in zip(rows, media, strict=True)]
        sizes = tuple(picture.size for picture in pictures)
        return [replace(text, sizes=sizes, written=tuple(written)) for text in encoded]

    def _process(self, chat: Chat, pictures: Sequence[Image.Image], videos: Sequence[Video], sample: str) -> Encoded:
        """Encodes a text as the processor does, all its answers labelled."""
        options = self._processor_options(chat)
        images = [list(pictures)] if pictures else None
        try:
            options |= video_arguments(videos) if videos else {}
            outputs = dict(self.processor(text=[chat.text], images=images, return_tensors="pt", **options))
            if pictures and videos:
                outputs |= displaced_inputs(self.processor, outputs, pictures, videos)
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            raise BadSample(sample, f"the processor refuses it: {one_line(str(error), 200)}") from error
        offsets, replaced = outputs.pop("offset_mapping", None), outputs.pop("text_replacement_offsets", None)
        replacements = replaced[0] if isinstance(replaced, list) and replaced else []  # without any, it may be a tensor
        ids = torch.as_tensor(outputs.pop("input_ids"))
        outputs.pop("labels", None)  # PaliGemma's processor makes some, uncut; ours are the same
        outputs.setdefault("attention_mask", torch.ones_like(ids))
        for name in outputs.keys() & ALIGNED:
            outputs[name] = torch.as_tensor(outputs[name])  # Ernie's processor leaves one an array
        if chat.by_token_types:
            # The answer's tokens are ones, and all before it count as the picture's.
            trained = [kind == 1 for kind in outputs["token_type_ids"][0].tolist()]
            media_end = trained.index(True) if True in trained else len(trained)
        elif offsets is None or ((pictures or videos) and not replacements):
            trained, media_end = self._by_prefixes(chat, ids[0].tolist(), pictures, videos, sample)
        else:
            token_spans = [(first, last) for first, last in torch.as_tensor(offsets)[0].tolist()]
            moves = [(tuple(replacement["span"]), tuple(replacement["new_span"])) for replacement in replacements]
            trained, media_end = from_offsets(chat, token_spans, moves, begin=self.prompts.bos_token or "")
        labels = torch.where(torch.tensor(trained), ids[0], IGNORED_LABEL)
        answers = chat.answers or tuple(range(len(chat.answer_spans)))
        return Encoded(ids[0], labels, inputs=outputs, media_end=media_end, answers=answers)

    def _processor_options(self, chat: Chat) -> dict[str, Any]:
        options: dict[str, Any] = {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        if self.prompts.bos_token is not None and chat.text.startswith(self.prompts.bos_token):
            options["add_special_tokens"] = False  # apply_chat_template does the same
        if "mm_token_type_ids" in self.processor.model_input_names:
            options["return_mm_token_type_ids"] = True  # Cosmos 3 Edge's needs them, and its processor waits for this
        options |= self.quirks.options
        if chat.suffix is not None:
            options["suffix"] = [chat.suffix]
        if chat.controls:
            options["controls"] = chat.controls
        return options

    def _by_prefixes(
        self, chat: Chat, ids: list[int], pictures: Sequence[Image.Image], videos: Sequence[Video], sample: str
    ) -> tuple[list[bool], int]:
        """Finds trained tokens without offsets: an answer is what the text gains by it (two processor calls each)."""
        if videos:
            raise BadSample(sample, f"{type(self.processor).__name__} does not say where its videos are")
        trained, token = [False] * len(ids), self.processor.image_token
        if not chat.answer_spans:  # a prompt, or one of the beginnings
            return trained, 0

        def tokens_up_to(position: int) -> int:
            """Counts the tokens shared with the text up to there, whose last may merge with what follows."""
            text = chat.text[:position]
            prefix = self._process(Chat(text, ()), pictures[: text.count(token)], (), sample).input_ids.tolist()
            return shared_beginning(ids, prefix)

        for answer in chat.answer_spans:
            start, end = map(tokens_up_to, answer)
            trained[start:end] = [True] * (end - start)
        last = chat.text.rfind(token)
        return trained, tokens_up_to(last + len(token)) if last >= 0 else 0
