"""Names of layers as PEFT reads them, a list of endings or a regular expression, as our patterns of full names."""

from __future__ import annotations

import re
from collections.abc import Iterable

ALL_LINEAR = "all-linear"
OUTPUT_HEAD = "lm_head"
"""Stands at the top of a model: no dot before it."""
TOPS = ("model", "transformer", "language_model", "vision_tower", "visual")
"""What stands at the top of models of transformers."""
_SPECIAL = re.compile(r"[*?\[]")
MOST = 64
"""Patterns that one expression may become."""


def globs_of_endings(names: Iterable[str]) -> list[str]:
    """PEFT's list: a name that it equals, or that it ends with behind a dot."""
    return [name if name == OUTPUT_HEAD or _is_full(name) else f"*.{name}" for name in names]


def _is_full(name: str) -> bool:
    """From the model's top, with a layer's number: as tools write the layers that they have adapted."""
    parts = name.split(".")
    return parts[0] in TOPS and any(part.isdecimal() for part in parts)


def globs_of_expression(expression: str) -> list[str]:
    """A regular expression that has to fit a whole name, as patterns that hit the same names.

    Raises: ValueError where it cannot be said so; the message is the part that cannot.
    """
    text = expression.removeprefix("^")
    text = text.removesuffix("$")
    reader = _Expression(text)
    globs = reader.choices()
    if reader.place != len(text):
        raise ValueError(text[reader.place :])
    return list(dict.fromkeys(re.sub(r"\*+", "*", one) for one in globs))


class _Expression:
    """Reads one expression from the left: texts, `.`, `.*`, `.+`, `\\d+`, classes, groups of choices, `?`."""

    def __init__(self, text: str) -> None:
        self.text, self.place = text, 0

    def choices(self) -> list[str]:
        """What stands between `|`, up to the end or a closing bracket."""
        found = self._sequence()
        while self._takes("|"):
            found += self._sequence()
        return found

    def _sequence(self) -> list[str]:
        found = [""]
        while self.place < len(self.text) and self.text[self.place] not in "|)":
            ends = self._element()
            found = [start + end for start in found for end in ends]
            if len(found) > MOST:
                raise ValueError(f"more than {MOST} patterns")
        return found

    def _element(self) -> list[str]:
        if self._takes("("):
            return self._group()
        single = self._single()
        if single == "?" and self._takes("*"):
            self._takes("?")  # lazy: the whole name has to fit all the same
            return ["*"]
        if single in ("?", "[0-9]") and self._takes("+"):
            self._takes("?")
            return [single + "*"]
        if self._takes("?"):
            return [single, ""]
        if self.place < len(self.text) and self.text[self.place] in "*+{":
            raise ValueError(self.text[self.place :])
        return [single]

    def _group(self) -> list[str]:
        if self._takes("?") and not self._takes(":"):
            raise ValueError(f"(?{self.text[self.place :]}")
        found = self.choices()
        if not self._takes(")"):
            raise ValueError("( is not closed")
        if self._takes("?"):
            return [*found, ""]
        if self.place < len(self.text) and self.text[self.place] in "*+{":
            raise ValueError(self.text[self.place :])
        return found

    def _single(self) -> str:
        character = self.text[self.place]
        self.place += 1
        if character == ".":
            return "?"
        if character == "\\":
            return self._escaped()
        if character == "[":
            return self._class()
        if character in "^$*+?{":
            raise ValueError(self.text[self.place - 1 :])
        return character

    def _escaped(self) -> str:
        if self.place == len(self.text):
            raise ValueError("\\")
        character = self.text[self.place]
        self.place += 1
        if character == "d":
            return "[0-9]"
        if character.isalnum():
            raise ValueError(f"\\{character}")
        return f"[{character}]" if _SPECIAL.match(character) else character

    def _class(self) -> str:
        end = self.text.find("]", self.place)
        inside = self.text[self.place : end]
        if end < 0 or "\\" in inside or not inside:
            raise ValueError(self.text[self.place - 1 :])
        self.place = end + 1
        return f"[{'!' + inside[1:] if inside.startswith('^') else inside}]"

    def _takes(self, sign: str) -> bool:
        if not self.text.startswith(sign, self.place):
            return False
        self.place += len(sign)
        return True
