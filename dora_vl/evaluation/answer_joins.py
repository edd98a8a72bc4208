"""Which question each row of a predictions file answers: by the id, or by what the benchmark's own files have instead.

A table by hand: LLaVA's question files name TextVQA's, MME's, VizWiz' and POPE's questions otherwise than the
publishers' annotations do. A row's prompt tells questions about one picture apart. Source of the names: LLaVA c121f04,
`llava/eval/eval_textvqa.py`, `eval_pope.py`, `scripts/convert_*.py`, and MME's `convert_answer_to_mme.py` beside them.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path, PurePosixPath
from typing import Protocol, runtime_checkable

from dora_vl.data.examples import Example
from dora_vl.data.turns import IMAGE_PLACEHOLDER
from dora_vl.errors import UserError, shown
from dora_vl.evaluation import prompts
from dora_vl.evaluation.answers_file import AnswerRow
from dora_vl.whole_numbers import number_of

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
        fitting = [order for order in orders if [_plain(one.question) for one in order] == asked]
        if len(fitting) > 1:
            raise UserError(f"the answers fit the questions in {len(fitting)} orders of their categories; give ids")
        return [one.id for one in fitting[0]] if fitting else [None] * len(rows)


def _own(row: AnswerRow) -> Key:
    return row.id


def question_in(prompt: str) -> str:
    """A prompt's question alone, in lower case with single spaces: suffixes, OCR tokens and placeholders go."""
    for suffix in _SUFFIXES:
        prompt = prompt.replace(suffix, " ")
    return _plain(_OCR.sub(" ", prompt.replace(IMAGE_PLACEHOLDER, " ")))


def _plain(question: str) -> str:
    for suffix in _SUFFIXES:
        question = question.replace(suffix, " ")
    return " ".join(question.lower().replace("imange", "image").split())


def _picture_stem(path: str) -> str:
    return PurePosixPath(path).stem


def _textvqa_row(row: AnswerRow) -> Key:
    question = question_in(row.prompt)
    return (REPEATED.sub("", row.id), question) if question else None


def _textvqa_example(example: Example) -> Key:
    return str(example.extra.get("image_id")), _plain(example.question)


def _mme_row(row: AnswerRow) -> Key:
    path, question = REPEATED.sub("", row.id), question_in(row.prompt)
    return (path.partition("/")[0], _picture_stem(path), question) if question else None


def _mme_example(example: Example) -> Key:
    if not example.images:
        return None
    return str(example.extra.get("category")), _picture_stem(example.images[0]), _plain(example.question)


def _picture_name(row: AnswerRow) -> Key:
    return PurePosixPath(row.ids.get("image", row.id)).name


def _picture_of(example: Example) -> Key:
    return PurePosixPath(example.images[0]).name if example.images else None


def _number_row(row: AnswerRow) -> Key:
    number = number_of(row.id)
    return None if number is None else (number, question_in(row.prompt))


def _number_example(example: Example) -> Key:
    found = re.search(r"_(\d+)$", _picture_stem(example.images[0])) if example.images else None
    number = number_of(found.group(1)) if found else None
    return None if number is None else (number, _plain(example.question))


def _clip_of(example: Example) -> Key:
    clip = example.extra.get("clip_id", example.extra.get("image_id"))
    return None if clip is None else str(clip)


OWN_ID = ByKey("id", _own, lambda example: example.id)
_CLIP = ByKey("clip_id or image_id", _own, _clip_of)

JOINS: Mapping[str, tuple[Join, ...]] = {
    "textvqa": (ByKey("picture and question", _textvqa_row, _textvqa_example),),
    "mme": (ByKey("subtask, picture and question", _mme_row, _mme_example),),
    "vizwiz": (
        ByKey("picture", _picture_name, _picture_of),
        ByKey("number in the picture's name, and question", _number_row, _number_example),
    ),
    "pope": (ByOrder("order, each prompt being the question's"),),
    "mmvet": (ByKey("number, v1_N", lambda row: f"v1_{row.id}", lambda example: example.id),),
    "nlvr2": (ByKey("identifier without .png", lambda row: row.id.removesuffix(".png"), lambda one: one.id),),
    "coco_caption": (_CLIP,),
    "tvc": (_CLIP,),
    "yc2c": (_CLIP,),
}
"""Benchmark -> ways to find a row's question beside its id; the one that finds most counts."""

LABELLED = frozenset({"tvqa", "how2qa"})
"""Their answers are "a" and the choice's index; VALUE's submissions hold the index alone."""


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A file's answers by the ids of their questions.

    Attributes:
        by: what the two had in common.
        strangers: the answers of rows that answer no question here, by the rows' own ids.
    """

    answers: dict[str, str]
    by: str
    strangers: dict[str, str]


def join(name: str, examples: Sequence[Example], rows: Sequence[AnswerRow], *, path: Path, questions: Path) -> Joined:
    """Each row's answer under its question's id; of two for one question the later stands.

    Raises:
        UserError: no row has a question, or it is not clear which; with the numbers.
    """
    tried: dict[str, list[str | None]] = {}
    unclear: list[str] = []
    for one in (OWN_ID, *JOINS.get(name, ())):
        try:
            tried[one.by] = one.pairs(rows, examples)
        except UserError as error:
            unclear.append(str(error))
    counts = {by: len(rows) - found.count(None) for by, found in tried.items()}
    most = max(counts.values())
    if not most:
        raise UserError(_nothing_common(path, questions, rows, examples, list(counts), unclear))
    first, *others = [by for by, count in counts.items() if count == most]
    differing = [by for by in others if tried[by] != tried[first]]
    if differing:
        raise UserError(
            f"{path}: {most} of {len(rows)} answers fit a question of {questions} by {first}, and as many fit another "
            f"one by {differing[0]}; give each answer its question's id"
        )
    found = tried[first]
    answers = {one: _said(row, name) for one, row in zip(found, rows, strict=True) if one is not None}
    strangers = {row.id: row.answer for one, row in zip(found, rows, strict=True) if one is None}
    return Joined(answers=answers, by=first, strangers=strangers)


def _said(row: AnswerRow, name: str) -> str:
    return f"a{row.answer}" if row.is_number and name in LABELLED else row.answer


def _nothing_common(
    path: Path,
    questions: Path,
    rows: Sequence[AnswerRow],
    examples: Sequence[Example],
    tried: Sequence[str],
    unclear: Sequence[str],
) -> str:
    if unclear:
        return f"{path}: {unclear[0]}"
    return (
        f"{path} ({len(rows)} answers) and {questions} ({len(examples)} questions) have no id in common, looked for by "
        f"{'; '.join(tried)}; first ids {shown(rows[0].id, 40)} and {shown(examples[0].id, 40)}; were they made from "
        "the same questions?"
    )
