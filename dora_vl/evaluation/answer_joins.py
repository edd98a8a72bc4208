"""Which question each row of a predictions file answers: by the id, or as the benchmark's own files name it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_vl.data.examples import Example
from dora_vl.errors import UserError, shown
from dora_vl.scores.answer_rows import AnswerRow
from dora_vl.scores.benchmark import Benchmark
from dora_vl.scores.joins import OWN_ID


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


def join(
    benchmark: Benchmark, examples: Sequence[Example], rows: Sequence[AnswerRow], *, path: Path, questions: Path
) -> Joined:
    """Each row's answer under its question's id; of two for one question the later stands.

    Raises:
        UserError: no row has a question, or it is not clear which; with the numbers.
    """
    tried: dict[str, list[str | None]] = {}
    unclear: list[str] = []
    for one in (OWN_ID, *benchmark.joins):
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
    answers = {one: _said(row, benchmark) for one, row in zip(found, rows, strict=True) if one is not None}
    strangers = {row.id: row.answer for one, row in zip(found, rows, strict=True) if one is None}
    return Joined(answers=answers, by=first, strangers=strangers)


def _said(row: AnswerRow, benchmark: Benchmark) -> str:
    return f"a{row.answer}" if row.is_number and benchmark.labels_choices else row.answer


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
