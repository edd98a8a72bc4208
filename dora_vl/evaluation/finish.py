"""From answers to scores and files: what `dora-vl evaluate` does once every question has been asked.

A benchmark is scored before anything of it is written, and one that cannot be scored takes no other one with it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from types import MappingProxyType

from dora_vl.data.example import Example, whole_file
from dora_vl.errors import UserError, one_line, shown
from dora_vl.evaluation.baselines import Baselines, Exchange, compared, right_text
from dora_vl.evaluation.predictions import METRICS, Origin, file_sha256, write_metrics
from dora_vl.evaluation.questions import EvaluationSet
from dora_vl.evaluation.scores.benchmark import Benchmark, Scorer, correct_index
from dora_vl.evaluation.scores.exact import final_answer
from dora_vl.evaluation.scores.exact import score as exact_match
from dora_vl.evaluation.scores.scored import RESAMPLES, Difference, Scored, intervals, paired_differences

DETAIL = "/"  # metrics of parts of a set have it in their name: they are in the file, not in the table


@dataclass(frozen=True, kw_only=True)
class Result:
    """One benchmark's score, its intervals, and the difference from another model's where that was asked for.

    Attributes:
        failed: the reason for each question without an answer, by id.
        not_scored: the reason for each record that is in no score, by id.
    """

    name: str
    file: Path
    scored: Scored
    failed: Mapping[str, str]
    not_scored: Mapping[str, str]
    ranges: Mapping[str, tuple[float, float]]
    differences: Mapping[str, Difference] = field(default_factory=dict)
    baselines: Baselines | None = None

    def entry(self) -> dict[str, object]:
        """What `metrics.json` holds about it."""
        scored = self.scored
        headline = next(iter(scored.metrics))
        return {
            "file": str(self.file),
            "file_sha256": file_sha256(self.file),
            "headline": headline,
            "n": scored.n,
            "metrics": {
                name: {
                    "value": value,
                    "interval_95": list(self.ranges[name]) if name in self.ranges else None,
                    "n": scored.items_of(name),
                }
                for name, value in scored.metrics.items()
            },
            "settings": scored.settings,
            "without_answer": len(scored.failed),
            "failed": dict(self.failed),
            **({"not_scored": dict(self.not_scored)} if self.not_scored else {}),
            "bootstrap": {"resamples": RESAMPLES, "units": len(scored.table.units)},
            **(
                {"difference": {name: asdict(one) for name, one in self.differences.items()}}
                if self.differences
                else {}
            ),
            **({"baselines": self.baselines.entry()} if self.baselines is not None else {}),
        }


def result(
    scored: Scored,
    *,
    name: str,
    file: Path,
    failed: Mapping[str, str],
    against: Scored | None = None,
    not_scored: Mapping[str, str] = MappingProxyType({}),
) -> Result:
    """A score with its intervals; `failed` may lack the reason for some of the ids that have no answer."""
    return Result(
        name=name,
        file=file,
        scored=scored,
        not_scored=not_scored,
        failed={one: failed.get(one, "the predictions hold no answer") for one in scored.failed},
        ranges=intervals(scored),
        differences={} if against is None else paired_differences(scored, against),
    )


def table(results: Sequence[Result], *, details: bool = False) -> list[str]:
    """One line for each metric, the benchmark's name on its first; numbers as the official scripts have them."""
    compared = any(one.differences for one in results)
    head = ["benchmark", "metric", "value", "95 % interval", "n", "no answer"]
    rows = [head + (["difference", "95 % interval"] if compared else [])]
    for one in results:
        shown = [name for name in one.scored.metrics if details or DETAIL not in name]
        for place, name in enumerate(shown):
            first = place == 0
            row = [one.name if first else "", name, f"{one.scored.metrics[name]:.2f}", _range(one.ranges.get(name))]
            row += [str(one.scored.n), str(len(one.scored.failed))] if first else ["", ""]
            if compared:
                row += _difference(one.differences.get(name))
            rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [_line(row, widths) for row in rows]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        cell.ljust(width) if column < 2 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _range(limits: tuple[float, float] | None) -> str:
    return "" if limits is None else f"{limits[0]:.2f} to {limits[1]:.2f}"


def _difference(one: Difference | None) -> list[str]:
    return ["", ""] if one is None else [f"{one.value:+.2f}", f"{one.low:+.2f} to {one.high:+.2f}"]


SCORES = "scores.jsonl"
LONGEST_REASON = 300


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One model's answers to one benchmark.

    Attributes:
        failed: the reason for each question that could not be asked or read, by id.
        sha256: of what gave the answers: adapter and base, or predictions.
        asked_with: the options that they were made with; empty for a predictions file.
        exchange: answers about exchanged pictures; None where none were asked for.
        joined_by: what a predictions file's rows and the questions had in common; "" for a model's own answers.
        strangers: ids of rows of the file that answer no question of the benchmark.
    """

    answers: Mapping[str, str]
    failed: Mapping[str, str]
    sha256: Mapping[str, str]
    asked_with: Mapping[str, object] = field(default_factory=dict)
    exchange: Exchange | None = None
    joined_by: str = ""
    strangers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What is to be written about one benchmark.

    Attributes:
        result: None where a judge or a server scores.
        submission: the file's name and its text.
    """

    one: EvaluationSet
    result: Result | None
    submission: tuple[str, str] | None


def finish(
    sets: Sequence[EvaluationSet],
    answered: Mapping[str, Answers],
    other: Mapping[str, Answers] | None,
    options: argparse.Namespace,
    to: Path,
) -> Iterator[str]:
    """Scores, writes metrics, single scores and submissions; yields what there is to say.

    Args:
        answered: by benchmark.
        other: another model's answers, to compare with.
        options: the command's.
        to: the folder of results.

    Raises:
        UserError: a benchmark could not be scored; what the others have is written first.
    """
    outcomes: list[_Outcome] = []
    reasons: dict[str, str] = {}
    for one in sets:
        try:
            outcomes.append(_outcome(one, answered[one.name], None if other is None else other[one.name], options))
        except UserError as error:
            if len(sets) == 1:
                raise
            reasons[one.name] = one_line(str(error), LONGEST_REASON)
    for outcome in outcomes:
        yield from _write(outcome, answered[outcome.one.name], to / outcome.one.name)
    results = [outcome.result for outcome in outcomes if outcome.result is not None]
    if results:
        yield from table(results, details=options.all_metrics)
        for one in results:
            for line in [] if one.baselines is None else one.baselines.lines():
                yield f"{one.name}: {line}"
    if outcomes:
        yield from write_metrics(
            to / METRICS,
            _origin(sets[0].name, answered, other, options),
            {one.name: one.entry() for one in results},
            asked=[outcome.one.name for outcome in outcomes],
            asked_with={name: dict(mine.asked_with) for name, mine in answered.items() if mine.asked_with},
        )
    if reasons:
        (first, reason), *_ = reasons.items()
        raise UserError(f"{len(reasons)} of {len(sets)} benchmarks not scored: {', '.join(reasons)}; {first}: {reason}")


def _outcome(one: EvaluationSet, mine: Answers, others: Answers | None, options: argparse.Namespace) -> _Outcome:
    found = None
    if one.scorer is not None:
        scored = _score(one, mine, options)
        against = None if others is None else _score(one, others, options)
        found = replace(
            result(
                scored, name=one.name, file=one.file, failed=mine.failed, against=against, not_scored=one.not_scored
            ),
            baselines=_baselines(one, scored, mine, options),
        )
    with _named_failures(one):
        write = one.benchmark.submissions.get(one.mode, one.benchmark.submission)
        submission = write and write(one.examples, mine.answers)
    return _Outcome(one=one, result=found, submission=submission)


@contextlib.contextmanager
def _named_failures(one: EvaluationSet) -> Iterator[None]:
    """What a scorer trips over in a record becomes a line; of an installed package's scorer as well.

    Raises:
        UserError: a record holds what the benchmark's code cannot read.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{one.file}: a record holds something that the scorer of {one.name} cannot read "
            f"({type(error).__name__}: {shown(str(error), 120)}); prepare the set again"
        ) from error


def _write(outcome: _Outcome, mine: Answers, folder: Path) -> Iterator[str]:
    one = outcome.one
    if mine.strangers:
        yield (
            f"{one.name}: {len(mine.strangers)} answers belong to none of its questions and are left out, first "
            f"{shown(mine.strangers[0])}"
        )
    if outcome.submission is not None:
        name, text = outcome.submission
        with whole_file(folder / name) as stream:
            stream.write(text)
        yield f"{folder / name}: for {one.name}'s server or judge"
    if outcome.result is None:
        (folder / SCORES).unlink(missing_ok=True)  # of another split, asked before
        yield f"{one.name}: {one.file} holds no answers, or a judge scores it; no score here"
        return
    if one.not_scored:
        yield (
            f"{one.name}: {len(one.not_scored)} of {len(one.examples)} records hold no right answer and are in no "
            f"score, first {shown(next(iter(one.not_scored)))}; metrics.json names all"
        )
    with whole_file(folder / SCORES) as stream:
        for name, share in outcome.result.scored.per_item.items():
            stream.write(json.dumps({"id": name, "score": share}, ensure_ascii=False) + "\n")


def _origin(
    name: str, answered: Mapping[str, Answers], other: Mapping[str, Answers] | None, options: argparse.Namespace
) -> Origin:
    """What the numbers are of: all benchmarks of a command have the same two models."""
    return Origin(
        answers_of=str(options.adapter or options.model or options.predictions),
        answers_sha256=answered[name].sha256,
        against=None if options.against is None else str(options.against),
        against_sha256=None if other is None else other[name].sha256,
        limit=options.limit,
    )


def _score(one: EvaluationSet, mine: Answers, options: argparse.Namespace) -> Scored:
    scorer = _scorer(one, options)
    answers = {name: answer for name, answer in mine.answers.items() if name not in one.not_scored}
    with _named_failures(one):
        scored = scorer(one.scored, answers)
    if one.mode:
        scored.settings.setdefault("mode", one.mode)
    if mine.joined_by:
        scored.settings.setdefault("answers found by", mine.joined_by)
    return scored


def _scorer(one: EvaluationSet, options: argparse.Namespace) -> Scorer:
    if one.scorer is None:
        raise ValueError(f"{one.name} has no scorer")
    if one.name == "exact_match" and options.answer_after:
        return partial(exact_match, answer_after=options.answer_after)
    return one.scorer


def _baselines(one: EvaluationSet, scored: Scored, mine: Answers, options: argparse.Namespace) -> Baselines:
    with _named_failures(one):
        return compared(
            scored,
            one.scored,
            mine.answers,
            _scorer(one, options),
            says=partial(_says, one.benchmark, answer_after=options.answer_after),
            exchange=mine.exchange,
        )


def _says(benchmark: Benchmark, example: Example, *, answer_after: str | None) -> str:
    """The right answer as a model says it: a choice's label or letter, else the words that are compared."""
    if not benchmark.chooses and not benchmark.labels_choices:
        return final_answer(right_text(example), answer_after) or ""
    index = correct_index(example)
    return f"a{index}" if benchmark.labels_choices else ascii_uppercase[index]
