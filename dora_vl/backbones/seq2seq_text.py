"""Text of an encoder-decoder's inputs and labels as tokens; what does not fit is taken from the subtitles first."""

from __future__ import annotations

import logging

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dora_vl.backbones.seq2seq_prompt import Prompt
from dora_vl.data.dataset import TrainedAnswer
from dora_vl.errors import UserError

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
