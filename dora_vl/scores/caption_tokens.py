"""Captions as the words that caption metrics count.

With Java, the tokenizer is the official one: Stanford's PTBTokenizer (CoreNLP 3.4.1) through pycocoevalcap, lower
case, most punctuation dropped. Its quirks stay: brackets survive as "-lrb-" and the like (they are dropped in capitals
only), "!!" and "?!" survive, "£" becomes "#", "€" becomes "$", "½" becomes "1/2", some tokens hold a
no-break space.

Without Java, `fallback_tokens` does the same for ordinary captions; on odd ones it differs, so that scores are
comparable with each other only. The settings say which one it was.

A line break inside a caption (CR, CRLF, VT, FF, NEL, U+2028, U+2029...) shifts every later caption of the official
tokenizer by one: `one_line` removes them first.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Literal

from dora_vl.errors import UserError

Tokenizer = Literal["ptb", "fallback"]

DROPPED = frozenset({"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"})
"""The official list; its bracket names are in capitals and never met."""

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SYMBOLS = str.maketrans(
    {
        "£": "#",
        "€": "$",
        "½": "1/2",
        "¼": "1/4",
        "¾": "3/4",
        "’": "'",
        "‘": "`",
        "“": '"',
        "”": '"',
        "–": "--",
        "—": "--",
    }
)
_CLITICS = re.compile(r"(?<=[a-z])(n't|'(?:s|m|d|re|ve|ll))(?![a-z])")
_SPLIT_WORDS = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me"}
_TOKEN = re.compile(
    r"(?:[a-z]\.){2,}"  # abbreviations: u.s.
    r"|\d+(?:[.,:/]\d+)+"  # 3.5, 1,000, 10:30, 1/2
    r"|n't|'(?:s|m|d|re|ve|ll)\b"
    r"|[^\W_]+(?:[-'&_/][^\W_]+)*"  # words, with hyphens or strokes inside
    r"|[!?]{2,}|\.{3}|--+"
    r"|\S"
)


def tokenizer_here() -> Tokenizer:
    """The official tokenizer where there is a Java to run it."""
    return "ptb" if shutil.which("java") else "fallback"


def one_line(caption: str) -> str:
    """The caption without line breaks of any kind, single spaces in their place."""
    return " ".join(caption.splitlines()).replace("\x00", " ")


def tokenized(captions: Mapping[str, Sequence[str]], tokenizer: Tokenizer) -> dict[str, list[str]]:
    """Every caption as its words with a space between them.

    Args:
        captions: the captions of each clip.

    Raises:
        UserError: pycocoevalcap or Java is not there.
    """
    clean = {clip: [one_line(caption) for caption in several] for clip, several in captions.items()}
    if tokenizer == "fallback":
        return {clip: [" ".join(fallback_tokens(caption)) for caption in several] for clip, several in clean.items()}
    return _official(clean)


def fallback_tokens(caption: str) -> list[str]:
    """The words of one caption by rules that follow the Penn Treebank's, without Java."""
    text = _CLITICS.sub(r" \1", one_line(caption).translate(_SYMBOLS).lower())
    found = (match.group() for match in _TOKEN.finditer(text))
    tokens = [_BRACKETS.get(token, token) for token in found]
    words = [word for token in tokens for word in _SPLIT_WORDS.get(token, token).split()]
    return [word for word in words if word not in DROPPED and word != '"']


def _official(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    try:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ModuleNotFoundError as error:
        raise UserError("caption metrics need pycocoevalcap: pip install 'dora-vl[caption]'") from error
    if shutil.which("java") is None:
        raise UserError("the official caption tokenizer needs Java (8 or later); the fallback tokenizer needs none")
    # Its own tokenizer loses a caption that is empty, and with it the count of lines: keep a word in its place.
    standing = {
        clip: [{"caption": caption.strip() or "."} for caption in several] for clip, several in captions.items()
    }
    try:
        words = PTBTokenizer().tokenize(standing)  # it writes a file into its own folder
    except OSError as error:
        raise UserError(
            f"the official caption tokenizer cannot run ({error}); the fallback tokenizer needs no Java"
        ) from error
    lost = [clip for clip, several in standing.items() if len(words.get(clip, ())) != len(several)]
    if lost:
        raise UserError(f"Java's tokenizer lost captions of {len(lost)} clips, first {lost[0]}; see what it said above")
    return words
