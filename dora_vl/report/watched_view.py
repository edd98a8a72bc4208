"""The fixed questions of a run as a table: a row for each question, a column for each step they were asked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dora_vl.report.inline_pictures import InlinePictures
from dora_vl.report.run_record import RunRecord
from dora_vl.run.watched import Watched, WatchedQuestion, evenly
from dora_vl.scores.exact_match import final_answer, normalised

MOST_STEPS = 8


@dataclass(frozen=True, kw_only=True)
class WatchedAnswer:
    """What was said at one step; None: it could not be asked."""

    text: str | None
    right: bool


@dataclass(frozen=True, kw_only=True)
class WatchedRow:
    """One question; `picture` is a data URL."""

    question: str
    truth: str
    picture: str
    why_no_picture: str
    answers: tuple[WatchedAnswer, ...]


@dataclass(frozen=True, kw_only=True)
class WatchedTable:
    """All of one run."""

    label: str
    steps: tuple[int, ...]
    asked: int
    """At how many steps; a few of them are shown."""
    rows: tuple[WatchedRow, ...]


def watched_tables(runs: Sequence[RunRecord], pictures: InlinePictures) -> tuple[list[WatchedTable], list[str]]:
    """A table for each run that has been watched, and a sentence for each that has not."""
    tables: list[WatchedTable] = []
    notes: list[str] = []
    for run in runs:
        if run.watched is None or not run.watched.answers:
            notes.append(
                f"{run.label}: no fixed questions were asked while it trained; that needs validation data or a test, "
                "and watch above 0."
            )
            continue
        tables.append(_table(run, run.watched, pictures))
    return tables, notes


def _table(run: RunRecord, watched: Watched, pictures: InlinePictures) -> WatchedTable:
    steps = _steps(sorted(watched.answers))
    after = run.section("evaluation").get("answer_after")
    after = after if isinstance(after, str) else None
    rows = tuple(_row(one, watched, steps, after, pictures) for one in watched.questions)
    return WatchedTable(label=run.label, steps=tuple(steps), asked=len(watched.answers), rows=rows)


def _steps(all_steps: Sequence[int]) -> list[int]:
    """A few, evenly, the last among them."""
    return sorted({*evenly(all_steps, MOST_STEPS - 1), *all_steps[-1:]})


def _row(
    one: WatchedQuestion, watched: Watched, steps: Sequence[int], after: str | None, pictures: InlinePictures
) -> WatchedRow:
    url, why = pictures.file(watched.folder / one.picture) if one.picture else ("", one.why_no_picture)
    right = _compared(one.truth, after)
    said = [watched.answers[step].get(one.id) for step in steps]
    answers = tuple(
        WatchedAnswer(text=text, right=text is not None and _compared(text, after) == right) for text in said
    )
    return WatchedRow(question=one.question, truth=one.truth, picture=url, why_no_picture=why, answers=answers)


def _compared(text: str, after: str | None) -> str:
    return normalised(final_answer(text, after) or "")
