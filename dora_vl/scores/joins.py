"""Ways to find which question a row of a predictions file answers, beside the id.

LLaVA's question files name TextVQA's, MME's, VizWiz' and POPE's questions otherwise than the publishers' annotations
do. A row's prompt tells questions about one picture apart. Source of the names: LLaVA c121f04,
`llava/eval/eval_textvqa.py`, `eval_pope.py`, `scripts/convert_*.py`, and MME's `convert_answer_to_mme.py`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import PurePosixPath
from typing import Protocol, runtime_checkable

from dora_vl.data.examples import Example
from dora_vl.data.turns import IMAGE_PLACEHOLDER
from dora_vl.errors import UserError, shown
from dora_vl.scores import prompts
from dora_vl.scores.answer_rows import AnswerRow

Key = Hashable | None
MOST_CATEGORIES = 4  # whose orders are tried
REPEATED = re.compile(r"#\d+$")
"""How `questions` tells questions of one id apart."""
_SUFFIXES = (prompts.SHORT, prompts.LETTER, prompts.LETTER_CN, prompts.UNANSWERABLE, prompts.YES_OR_NO)
_OCR = re.compile(r"^Reference OCR token:.*$", re.MULTILINE)


@runtime_checkable
class Join(Protocol):
    """One way to find a row's question."""

    @property
    def by(self) -> str:
        """What the two have in common, for people."""
        ...

    def pairs(self, rows: Sequence[AnswerRow], examples: Sequence[Example]) -> list[str | None]:
        """The id of each row's question; None where there is none.

        Raises:
            UserError: several questions could be meant.
        """
        ...


@dataclass(frozen=True)
class ByKey:
    """By something that both sides have; several questions of one key are told apart by their order, if all are there.

    Attributes:
        of_row: a row's key; None where it has none.
        of_example: a question's.
    """

    by: str
    of_row: Callable[[AnswerRow], Key]
    of_example: Callable[[Example], Key]

    def pairs(self, rows: Sequence[AnswerRow], examples: Sequence[Example]) -> list[str | None]:
        """See `Join`."""
        named: defaultdict[Key, list[str]] = defaultdict(list)
        for example in examples:
            named[self.of_example(example)].append(example.id)
        named.pop(None, None)
        keys = [self.of_row(row) for row in rows]
        counts = Counter(keys)
        shared = [key for key in named if len(named[key]) > 1 and counts[key]]
        unequal = [key for key in shared if counts[key] != len(named[key])]
        if unequal:
            key = unequal[0]
            raise UserError(
                f"{len(unequal)} keys ({self.by}) fit several questions, first {shown(key)}: {counts[key]} answers "
                f"for {len(named[key])} questions; give each answer its question's id"
            )
        turn: Counter[Key] = Counter()
        found: list[str | None] = []
        for key in keys:
            several = named.get(key, ())
            found.append(several[min(turn[key], len(several) - 1)] if several else None)
            turn[key] += 1
        return found


@dataclass(frozen=True)
class ByOrder:
    """By place, where each row's prompt holds the words of the question at its place; categories in any order."""

    by: str

    def pairs(self, rows: Sequence[AnswerRow], examples: Sequence[Example]) -> list[str | None]:
        """See `Join`."""
        asked = [question_in(row.prompt) for row in rows]
        categories: defaultdict[str, list[Example]] = defaultdict(list)
        for example in examples:
            categories[str(example.extra.get("category"))].append(example)
        if len(rows) != len(examples) or not all(asked) or len(categories) > MOST_CATEGORIES:
            return [None] * len(rows)
        orders = [[one for name in names for one in categories[name]] for names in permutations(categories)]
        fitting = [order for order in orders if [plain(one.question) for one in order] == asked]
        if len(fitting) > 1:
            raise UserError(f"the answers fit the questions in {len(fitting)} orders of their categories; give ids")
        return [one.id for one in fitting[0]] if fitting else [None] * len(rows)


def question_in(prompt: str) -> str:
    """A prompt's question alone, in lower case with single spaces: suffixes, OCR tokens and placeholders go."""
    for suffix in _SUFFIXES:
        prompt = prompt.replace(suffix, " ")
    return plain(_OCR.sub(" ", prompt.replace(IMAGE_PLACEHOLDER, " ")))


def plain(question: str) -> str:
    """A question in lower case with single spaces, without suffixes; POPE's "imange" is an image."""
    for suffix in _SUFFIXES:
        question = question.replace(suffix, " ")
    return " ".join(question.lower().replace("imange", "image").split())


def picture_stem(path: str) -> str:
    """A picture's name without its folders and ending."""
    return PurePosixPath(path).stem


OWN_ID = ByKey("id", lambda row: row.id, lambda example: example.id)
