"""What no prompt can be, by numbers alone: refused before a long talk is rendered, or a huge text tokenised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

MOST_TURNS = 512
"""A template's time grows with the square of the turns."""
SWALLOWED = ("\ue000", " ")
"""Of what some tokenizers make one token of any length, or none: characters that they do not know, and spaces."""
REPEATED = 16


def refuse_endless(turns: Sequence[Turn], tokens: int | None, longest_token: int | None) -> None:
    """Refuses a talk that is too long whatever its tokens are.

    Args:
        turns: the talk.
        tokens: most that a prompt may have; None: any number.
        longest_token: most characters of one; None: any number.

    Raises:
        BadSample: it has too many turns, or more characters than so many tokens.
    """
    if len(turns) > MOST_TURNS:
        raise BadSample("request", f"the talk has {len(turns)} turns, and {MOST_TURNS} are allowed; begin a new one")
    if tokens is None or longest_token is None:
        return
    characters = sum(len(turn.text) for turn in turns)
    if characters > tokens * longest_token:
        reason = f"its {characters:,} characters are more than a prompt of {tokens:,} tokens can hold; shorten it"
        raise BadSample("request", reason)


def longest_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Most characters that one token of a prompt stands for; None where they may be any number, or are not known.

    Of a tokenizer's entries each character stands for at most one of the text: of bytes, and of `<0x0A>`, for less.

    Args:
        tokenizer: of the prompts.
    """
    try:
        longest = max(map(len, tokenizer.get_vocab()))
        texts = [one * REPEATED * longest for one in SWALLOWED]
        bounded = all(len(tokenizer.encode(text, add_special_tokens=False)) * longest >= len(text) for text in texts)
    except (NotImplementedError, TypeError, ValueError):  # without a vocabulary, or not of text alone
        return None
    return longest if bounded else None
