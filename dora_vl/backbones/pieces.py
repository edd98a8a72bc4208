"""A tokenizer in the place of a processor, and which of a processor's tokens are trained."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from dora_vl.backbones.prompts import Chat, Prompt
from dora_vl.backbones.templates import Span
from dora_vl.data.samples import TrainedAnswer
from dora_vl.errors import UserError

Move = tuple[Span, Span]


class TokenRoles(NamedTuple):
    """Whether each token is of an answer or closes one, and the first place after those of every picture and video."""

    trained: list[bool]
    media_end: int


def from_offsets(chat: Chat, offsets: Sequence[Span], moves: Sequence[Move], *, begin: str) -> TokenRoles:
    """Of a processor that tells each token's characters.

    A token that an answer begins or ends in is trained whole. Some processors (Molmo 2's, Emu 3's) put the begin token
    in front of the text and count from there.

    Args:
        chat: the text and its answers.
        offsets: each token's characters, in the text in which pictures and videos stand as their tokens.
        moves: each picture's and video's characters in the chat's text, and in that one.
        begin: the begin token's text.
    """
    gained = sum((new[1] - new[0]) - (old[1] - old[0]) for old, new in moves)
    added = max((last for _, last in offsets), default=0) - len(chat.text) - gained
    shift = len(begin) if added == len(begin) and not chat.text.startswith(begin) else 0
    answers = [(_moved(start, moves, shift), _moved(end, moves, shift)) for start, end in chat.answer_spans]
    trained = [any(first < end and start < last for start, end in answers) for first, last in offsets]
    last = moves[-1][1][1] if moves else 0
    return TokenRoles(
        trained, max((n for n, (start, end) in enumerate(offsets, 1) if start < last and end > start), default=0)
    )


def _moved(place: int, moves: Sequence[Move], shift: int) -> int:
    """A place in the chat's text, in the text that was tokenised; `moves` count from the latter's beginning."""
    ends = [old[1] for old, _ in moves]
    gained = [0, *(new[1] - old[1] for old, new in moves)]
    return place + shift + gained[bisect_right(ends, place + shift)]


def from_token_types(token_type_ids: Sequence[int]) -> TokenRoles:
    """Of a processor that takes the answer apart and marks its tokens by ones; all before it count as the picture's."""
    trained = [kind == 1 for kind in token_type_ids]
    return TokenRoles(trained, trained.index(True) if True in trained else len(trained))


def from_prefixes(chat: Chat, ids: Sequence[int], ids_of: Callable[[str], list[int]], *, picture: str) -> TokenRoles:
    """Of a processor that tells nothing: from how many tokens the text takes up to an answer, and through it.

    It costs the processor two further calls an answer, pictures included.

    Args:
        chat: the text and its answers.
        ids: the whole text's tokens.
        ids_of: a beginning of the text as tokens, by the same processor.
        picture: what stands for a picture in the text.
    """
    trained = [False] * len(ids)
    for answer in chat.answer_spans:
        start, end = (_shared(ids, ids_of(chat.text[:place])) for place in answer)
        trained[start:end] = [True] * (end - start)
    last = chat.text.rfind(picture)
    return TokenRoles(trained, _shared(ids, ids_of(chat.text[: last + len(picture)])) if last >= 0 else 0)


def _shared(ids: Sequence[int], prefix: Sequence[int]) -> int:
    """How many tokens a text and its beginning have in common; the end of the latter may be joined to what follows."""
    pairs = enumerate(zip(ids, prefix, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(ids), len(prefix)))


class TextProcessor:
    """Takes what a processor takes, without pictures; its methods and attributes have a processor's names."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @property
    def model_input_names(self) -> list[str]:
        """The tokenizer's own."""
        return self.tokenizer.model_input_names

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's own."""
        found: Any = self.tokenizer.chat_template
        return found

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any:
        """As a processor's."""
        return self.tokenizer.apply_chat_template(conversation, **options)

    def __call__(self, *, text: Sequence[str], images: None = None, **options: Any) -> BatchEncoding:
        """As a processor's; pictures must have been refused before."""
        del images
        options.pop("return_text_replacement_offsets", None)
        return self.tokenizer(list(text), **options)


# Text of an encoder-decoder's inputs and labels as tokens; what does not fit is taken from the subtitles first.


logger = logging.getLogger(__name__)


class Seq2SeqEncoder:
    """Tokens of BART's form, `<s> text </s>`. Worker processes may have it.

    Args:
        tokenizer: the base's, with the picture tokens in its vocabulary.
        subtitles_first: cuts subtitles at their end until the rest fits; otherwise the end of the whole text is cut,
            the question and its choices with it, as in the published video runs.
        max_positions: of the model's encoder and decoder, neither of which reads a longer text; it is cut likewise.
            None: no end.
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
        """Ids with their ends, and how many tokens were cut."""
        max_tokens = self._longest(max_tokens)
        if not self.subtitles_first or not prompt.subtitles:
            whole = self._ids(prompt.subtitles_before + prompt.subtitles + prompt.text)
            return self._closed(whole, max_tokens)
        before, rest = self._ids(prompt.subtitles_before), self._ids(prompt.text)
        subtitles = self._ids(prompt.subtitles)
        room = len(subtitles) if max_tokens is None else max(0, max_tokens - 2 - len(before) - len(rest))
        ids, cut = self._closed([*before, *subtitles[:room], *rest], max_tokens)
        return ids, cut + max(0, len(subtitles) - room)

    def labels(self, text: str, *, max_tokens: int) -> Int[Tensor, " answer"]:
        """Ids with their ends; a longer text loses its end, never the end token."""
        return self._closed(self._ids(text), self._longest(max_tokens))[0]

    def answer(self, text: str) -> TrainedAnswer:
        """What the labels of a text must say."""
        return TrainedAnswer(str(self.tokenizer.bos_token), text, str(self.tokenizer.eos_token))

    def decode(self, ids: Int[Tensor, " answer"]) -> str:
        """The text of generated ids, without special tokens."""
        text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).strip()

    def first_token(self, text: str) -> int | None:
        """The id of a text that is one token; None for a text of several."""
        ids = self._ids(text)
        return ids[0] if len(ids) == 1 else None

    def _longest(self, max_tokens: int | None) -> int | None:
        return min((one for one in (max_tokens, self.max_positions) if one is not None), default=None)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids) if text else []

    def _closed(self, ids: list[int], max_tokens: int | None) -> tuple[Tensor, int]:
        room = len(ids) if max_tokens is None else max(0, max_tokens - 2)
        return torch.tensor([self._begin, *ids[:room], self._end]), max(0, len(ids) - room)


def _id(value: object, name: str) -> int:
    if not isinstance(value, int):
        raise UserError(f"the tokenizer names no {name}, which a VL-BART needs")
    return value
