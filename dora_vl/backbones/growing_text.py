"""Text of tokens as they come, at the cost of the last few: to decode the whole answer each time takes ever longer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

NOT_YET_A_CHARACTER = "\ufffd"
"""What decoding gives for the first bytes of a character whose last are still to come."""


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Iterable[object]) -> str:
    """The text of ids, without special tokens; `ids` may be a tensor's row."""
    return str(tokenizer.decode([int(one) for one in ids], skip_special_tokens=True))  # pyright: ignore[reportArgumentType]


def growing_text(tokenizer: PreTrainedTokenizerBase, answer_in: Callable[[str], str]) -> Callable[[Sequence[int]], str]:
    """What gives the text of an answer's ids as they grow.

    Args:
        answer_in: what of the whole text is the answer.
    """
    if tokenizer.clean_up_tokenization_spaces:  # takes spaces back across several tokens
        return lambda ids: answer_in(decoded(tokenizer, ids))
    return GrowingText(partial(decoded, tokenizer), answer_in)


class GrowingText:
    """Gives the text of ids that grow from call to call; the same as decoding them all.

    A token's text depends on the one before it (a space between words, the rest of a character), so what is decoded
    each time is the tokens since the last text but one.

    Args:
        decode: the text of some ids.
        answer_in: what of the whole text is the answer.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], answer_in: Callable[[str], str]) -> None:
        self._decode = decode
        self._answer_in = answer_in
        self._text = ""
        self._from = 0
        self._until = 0
        self._known = ""
        """The text of the ids from `_from` to `_until`."""

    def __call__(self, ids: Sequence[int]) -> str:
        """The answer so far; `ids` begin with those of the call before."""
        window = self._decode(ids[self._from :])
        if not window.startswith(self._known):
            return self._answer_in(self._anew(ids))
        new = window[len(self._known) :]
        if not new or window.endswith(NOT_YET_A_CHARACTER):
            return self._answer_in(self._text + new)
        self._text += new
        self._go_on(len(ids), ids)
        return self._answer_in(self._text)

    def _anew(self, ids: Sequence[int]) -> str:
        """A tokenizer that takes text back which it gave, such as a space before a full stop."""
        whole = self._decode(ids)
        if not whole.endswith(NOT_YET_A_CHARACTER):
            self._text = whole
            self._go_on(len(ids), ids)
        return whole

    def _go_on(self, until: int, ids: Sequence[int]) -> None:
        self._from, self._until = self._until, until
        self._known = self._decode(ids[self._from : self._until])
