"""Marks which of a processor's tokens are trained, and makes a processor of a tokenizer."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dora_vl.backbones.families.formats import CharSpan, Chat
from dora_vl.data.samples import TrainedAnswer
from dora_vl.data.turns import IMAGE_PLACEHOLDER
from dora_vl.errors import UserError
from dora_vl.shapes import Int

STAND_IN = "stand-in"
"""A picture whose outputs are stored has this key in its `info`: its size counts, its pixels are not read."""

Move = tuple[CharSpan, CharSpan]


def from_offsets(
    chat: Chat, offsets: Sequence[CharSpan], moves: Sequence[Move], *, begin: str
) -> tuple[list[bool], int]:
    """Marks tokens that belong to an answer or close it; also returns the position after the last picture or video.

    The processor tells each token's characters. A token that an answer begins or ends in is trained whole. Some
    processors (Molmo 2's, Emu 3's) put the begin token in front of the text and count from there.

    Args:
        offsets: each token's characters, in the text in which pictures and videos are written as their tokens.
        moves: each picture's and video's characters in the chat's text, and in that one.
    """
    gained = sum((new[1] - new[0]) - (old[1] - old[0]) for old, new in moves)
    added = max((last for _, last in offsets), default=0) - len(chat.text) - gained
    shift = len(begin) if added == len(begin) and not chat.text.startswith(begin) else 0
    ends = [old[1] for old, _ in moves]
    gains = [0, *(new[1] - old[1] for old, new in moves)]
    # Offsets in the tokenised text; `moves` count from its beginning.
    positions = [position + shift for span in chat.answer_spans for position in span]
    moved = [position + gains[bisect_right(ends, position)] for position in positions]
    answers = list(zip(moved[::2], moved[1::2], strict=True))
    trained = [any(first < end and start < last for start, end in answers) for first, last in offsets]
    last = moves[-1][1][1] if moves else 0
    media = [number for number, (start, end) in enumerate(offsets, 1) if start < last and end > start]
    return trained, max(media, default=0)


_FIRST_STAND_IN = 0xFDD1  # after `templates.BREAK`; Unicode reserves U+FDD0 to U+FDEF as noncharacters
_STAND_INS = 31


def _stand_ins(tokens: Sequence[str]) -> dict[str, str]:
    """Makes a string of noncharacters for each token, as long as the token, that encodes its number."""
    stand_ins = {}
    for number, token in enumerate(tokens):
        digits = chr(_FIRST_STAND_IN + number % _STAND_INS)
        while number := number // _STAND_INS:
            digits = chr(_FIRST_STAND_IN + number % _STAND_INS) + digits
        stand_ins[token] = digits.rjust(len(token), chr(_FIRST_STAND_IN))
        if len(digits) > len(token):
            raise UserError(f"special token {token!r} is too short to be kept apart from text")
    return stand_ins


class PieceProcessor:
    """Does a processor's work for a LLaVA-1.5 or a language model, by methods of the same names.

    As in LLaVA, the text between pictures is tokenised piece by piece, with one begin token in front, so a piece after
    a picture begins like a text of its own (a SentencePiece tokenizer puts its space mark there).

    Special tokens count only where the template wrote them: a question may well contain `</s>` or `<|im_end|>` as
    characters. So special tokens in the text are switched off and the template's own are replaced by stand-ins of the
    same length, made of characters that no text holds, which the tokenizer's copy knows as added tokens with the
    special token's flags. The split of the text, and so every id and character offset, is the one that the plain
    tokenizer makes when the text holds no special token itself.

    Args:
        tokenizer: the language model's; a LLaVA's has the picture token.
        pixels: makes one picture's pixels; None for a language model.
        tokens_per_image: repeats the picture token for each picture.
        preparation: names all that decides the pixels.
    """

    model_input_names = ("input_ids", "attention_mask")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pixels: Callable[[Image.Image], Tensor] | None = None,
        tokens_per_image: int = 0,
        image_token_id: int = -1,
        preparation: str = "",
    ) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise UserError(
                f"{tokenizer.name_or_path} has no tokenizer.json; character offsets need a fast tokenizer (convert it "
                "with AutoTokenizer.from_pretrained(...).save_pretrained(...))"
            )
        self.tokenizer = tokenizer
        self.pixels = pixels
        self._blank: Tensor | None = None
        self.tokens_per_image = tokens_per_image
        self.image_token_id = image_token_id
        self.preparation = preparation
        if pixels is not None:
            self.image_token = IMAGE_PLACEHOLDER
        self._words = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._words.no_truncation()
        self._words.no_padding()
        special = {token_id: token for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._stand_ins = _stand_ins([token.content for token in special.values()])
        self._words.add_tokens(
            [
                AddedToken(self._stand_ins[token.content], normalized=False, lstrip=token.lstrip, rstrip=token.rstrip)
                for token in special.values()
            ]
        )
        self._real_ids = {
            self._words.token_to_id(self._stand_ins[token.content]): token_id for token_id, token in special.items()
        }
        # What the tokenizer puts before any text by itself: the begin token, or nothing.
        bare, around = (self._words.encode("a", add_special_tokens=added).ids for added in (False, True))
        starts = [index for index in range(len(around)) if around[index : index + len(bare)] == bare]
        if not bare or not starts:
            raise UserError(
                f"{tokenizer.name_or_path}: its tokenizer makes no token of a plain letter; take another base"
            )
        self._start_ids: list[int] = around[: starts[0]]

    @property
    def begin_text(self) -> str:
        """Returns the begin token's text; empty if the tokenizer puts none in front."""
        return str(self.tokenizer.decode(self._start_ids))

    @property
    def chat_template(self) -> str | None:
        """Returns the tokenizer's chat template."""
        template: Any = self.tokenizer.chat_template
        return template

    def to_json_string(self) -> str:
        """Names what decides the pixels, under a processor's method name."""
        return self.preparation

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any:
        """Applies the tokenizer's chat template."""
        return self.tokenizer.apply_chat_template(conversation, **options)

    def __call__(
        self,
        *,
        text: Sequence[str],
        images: Sequence[Sequence[Image.Image]] | None = None,
        controls: Sequence[CharSpan] = (),
        **_: Any,
    ) -> dict[str, Any]:
        """Encodes one text and its pictures; `controls` are spans of the format's special tokens, elsewhere text.

        Raises: ValueError if the text has places for more or fewer pictures.
        """
        (written,), pictures = text, images[0] if images else ()
        for start, end in controls:
            token = written[start:end]
            if token not in self._stand_ins:
                raise UserError(
                    f"the template writes {token!r}, which is not a special token of this tokenizer; choose a "
                    "model.template that fits the language model (tokenizer is its own)"
                )
            written = written[:start] + self._stand_ins[token] + written[end:]
        pieces = [written] if self.pixels is None else written.split(IMAGE_PLACEHOLDER)
        if len(pieces) - 1 != len(pictures):
            raise ValueError(f"{len(pieces) - 1} places for {len(pictures)} pictures")
        self._words.encode_special_tokens = True  # not kept by pickling, and a data worker gets this object pickled
        ids: list[int] = []
        offsets: list[CharSpan] = []
        replacements: list[dict[str, CharSpan]] = []
        start = 0
        for number, piece in enumerate(pieces):
            if number:
                span = (start, start + len(IMAGE_PLACEHOLDER))
                ids += [self.image_token_id] * self.tokens_per_image
                offsets += [span] * self.tokens_per_image
                replacements.append({"span": span, "new_span": span})
                start = span[1]
            encoding = self._words.encode(piece, add_special_tokens=False)
            ids += [self._real_ids.get(token, token) for token in encoding.ids]
            # A token of no characters (a space mark put before a piece) counts where it is.
            offsets += [(start + a, start + max(b, a + 1)) for a, b in encoding.offsets]
            start += len(piece)
        if ids[: len(self._start_ids)] != self._start_ids:
            ids, offsets = self._start_ids + ids, [(0, 1)] * len(self._start_ids) + offsets
        batch: dict[str, Any] = {"input_ids": torch.tensor([ids]), "offset_mapping": [offsets]}
        batch["text_replacement_offsets"] = [replacements]
        if self.pixels is not None and pictures:
            if STAND_IN in pictures[0].info:  # then all are
                blank = self._blank = self.pixels(pictures[0]) if self._blank is None else self._blank
                batch["pixel_values"] = blank.expand(len(pictures), *blank.shape)
            else:
                batch["pixel_values"] = torch.stack([self.pixels(picture) for picture in pictures])
        return batch


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """An encoder's input. `subtitles` may be cut at their end so that the whole fits; `text` follows them."""

    subtitles_before: str = ""
    subtitles: str = ""
    text: str


class Seq2SeqEncoder:
    """Encodes texts in BART's form, `<s> text </s>`. It can be sent to worker processes.

    Args:
        tokenizer: the base's, with the picture tokens in its vocabulary.
        subtitles_first: cuts subtitles at their end until the rest fits; otherwise the end of the whole text is cut,
            the question and its choices with it, as in the published video runs.
        max_positions: positions of the encoder and decoder; longer texts are cut. None cuts nothing.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, subtitles_first: bool = True, max_positions: int | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.subtitles_first = subtitles_first
        self.max_positions = max_positions
        self.pad_token_id = _id(tokenizer.pad_token_id, "pad_token")
        self._begin = _id(tokenizer.bos_token_id, "bos_token")
        self._end = _id(tokenizer.eos_token_id, "eos_token")

    def encode(self, prompt: Prompt, *, max_tokens: int | None) -> tuple[Int[Tensor, " seq"], int]:
        """Returns ids with their ends, and how many tokens were cut."""
        max_tokens = self._longest(max_tokens)
        if not self.subtitles_first or not prompt.subtitles:
            ids_of_all = self._ids(prompt.subtitles_before + prompt.subtitles + prompt.text)
            return self._closed(ids_of_all, max_tokens)
        before, rest = self._ids(prompt.subtitles_before), self._ids(prompt.text)
        subtitles = self._ids(prompt.subtitles)
        room = len(subtitles) if max_tokens is None else max(0, max_tokens - 2 - len(before) - len(rest))
        ids, cut = self._closed([*before, *subtitles[:room], *rest], max_tokens)
        return ids, cut + max(0, len(subtitles) - room)

    def labels(self, text: str, *, max_tokens: int) -> tuple[Int[Tensor, " answer"], int]:
        """Returns ids with their ends, and how many tokens were cut; never the end token."""
        return self._closed(self._ids(text), self._longest(max_tokens))

    def answer(self, text: str) -> TrainedAnswer:
        """Returns what the labels of a text must decode to."""
        return TrainedAnswer(str(self.tokenizer.bos_token), text, str(self.tokenizer.eos_token))

    def decode(self, ids: Int[Tensor, " answer"]) -> str:
        """Decodes generated ids, without special tokens."""
        text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).strip()

    def first_token(self, text: str) -> int | None:
        """Returns the id of a text that is one token; None for a text of several."""
        ids = self._ids(text)
        return ids[0] if len(ids) == 1 else None

    def _longest(self, max_tokens: int | None) -> int | None:
        return min((limit for limit in (max_tokens, self.max_positions) if limit is not None), default=None)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids) if text else []

    def _closed(self, ids: list[int], max_tokens: int | None) -> tuple[Tensor, int]:
        room = len(ids) if max_tokens is None else max(0, max_tokens - 2)
        return torch.tensor([self._begin, *ids[:room], self._end]), max(0, len(ids) - room)


def _id(value: object, name: str) -> int:
    if not isinstance(value, int):
        raise UserError(f"the tokenizer names no {name}, which a VL-BART needs")
    return value
