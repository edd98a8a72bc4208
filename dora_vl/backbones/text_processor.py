"""A tokenizer in the place of a processor, and the characters that a processor's tokens stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from transformers import BatchEncoding, PreTrainedTokenizerBase

from dora_vl.backbones.processor_chat import Chat
from dora_vl.backbones.templates import Span

Move = tuple[Span, Span]


class Characters(NamedTuple):
    """Each token's characters, and those of each picture in the chat's text and in the text that was tokenised."""

    offsets: list[Span]
    moves: list[Move]


def from_chat(chat: Chat, offsets: Sequence[Span], moves: Sequence[Move], *, begin: str) -> Characters:
    """What a processor tells, counted from the beginning of the chat's text.

    Some processors (Molmo 2's, Emu 3's) put the begin token in front of the text and count from there.
    """
    gained = sum((new[1] - new[0]) - (old[1] - old[0]) for old, new in moves)
    added = max((last for _, last in offsets), default=0) - len(chat.text) - gained
    shift = len(begin) if added == len(begin) and not chat.text.startswith(begin) else 0
    if not shift:
        return Characters(list(offsets), list(moves))
    return Characters(
        [_back(span, shift) for span in offsets], [(_back(old, shift), _back(new, shift)) for old, new in moves]
    )


def from_token_types(chat: Chat, token_type_ids: Sequence[int]) -> Characters:
    """Of a processor that takes the answer apart and marks its tokens by ones: the answer's span, or the text."""
    (answer,) = chat.answer_spans or ((len(chat.text), len(chat.text) + 1),)
    text = (0, answer[0])
    return Characters([answer if one == 1 else text for one in token_type_ids], [(text, text)])


def from_prefixes(chat: Chat, ids: Sequence[int], ids_of: Callable[[str], list[int]], *, picture: str) -> Characters:
    """Of a processor that tells nothing: from how many tokens the text takes up to an answer, and through it.

    Tokens of an answer get the answer's span, those before the last picture's end the text up to there, others none.
    It costs the processor two further calls an answer, pictures included.

    Args:
        chat: the text and its answers.
        ids: the whole text's tokens.
        ids_of: a beginning of the text as tokens, by the same processor.
        picture: what stands for a picture in the text.
    """
    offsets: list[Span] = [(0, 0)] * len(ids)
    moves: list[Move] = []
    if (last := chat.text.rfind(picture)) >= 0:
        before = (0, last + len(picture))
        end = _shared(ids, ids_of(chat.text[: before[1]]))
        offsets[:end] = [before] * end
        moves = [(before, before)]
    for answer in chat.answer_spans:
        start, end = (_shared(ids, ids_of(chat.text[:place])) for place in answer)
        offsets[start:end] = [answer] * (end - start)
    return Characters(offsets, moves)


def _shared(ids: Sequence[int], prefix: Sequence[int]) -> int:
    """How many tokens a text and its beginning have in common; the end of the latter may be joined to what follows."""
    pairs = enumerate(zip(ids, prefix, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(ids), len(prefix)))


def _back(span: Span, shift: int) -> Span:
    return max(span[0] - shift, 0), max(span[1] - shift, 0)


class TextProcessor:
    """Takes what a processor takes, without pictures; its methods and attributes have a processor's names."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

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
