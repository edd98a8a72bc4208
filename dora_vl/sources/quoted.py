"""What messages and manifests show of a publisher's values: short, on one line, in characters that every file holds."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from reprlib import Repr

QUOTED = 60
"""Characters of one value in a message; a message quotes a few values, and a line holds 500 at most."""
NAMED = 8

_shown = Repr()
_shown.maxlevel = 2
_shown.maxstring = _shown.maxlong = _shown.maxother = QUOTED
_shown.maxlist = _shown.maxdict = _shown.maxtuple = 4


def short(value: object, most: int = QUOTED) -> str:
    """A value as Python writes it, cut in its middle; a value of any size or depth costs the same."""
    return cut(_shown.repr(value), most)


def cut(text: str, most: int) -> str:
    """Text of at most so many characters, its control characters and lone surrogates spelled out."""
    visible = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text[: most + 1]
    )
    return visible if len(visible) <= most else visible[: most - 3] + "..."


def names(found: Iterable[object]) -> str:
    """The first few names of columns or fields, such as those that a row has."""
    return ", ".join(cut(str(name), 24) for name in islice(found, NAMED)) or "nothing"
