"""From predictions to scores and files: what `dora-vl evaluate` does once every question has been asked.

A benchmark is scored before anything of it is written, and one that cannot be scored takes no other one with it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from types import MappingProxyType

from dora_vl.data.example import JSON, Example, whole_file
from dora_vl.errors import UserError, one_line, shown
from dora_vl.evaluation.baselines import Baselines, Exchange, compared, right_text
from dora_vl.evaluation.predictions import METRICS, Predictions, file_sha256, write_metrics
from dora_vl.evaluation.questions import EvaluationSet
from dora_vl.evaluation.scores.benchmark import Scorer, correct_index
from dora_vl.evaluation.scores.exact import final_answer
from dora_vl.evaluation.scores.exact import score as exact_match
from dora_vl.evaluation.scores.scored import RESAMPLES, Difference, Scored, intervals, paired_differences

DETAIL = "/"  # metrics of parts of a set have it in their name: they are in the file, not in the table
SCORES = "scores.jsonl"
LONGEST_REASON = 300


@dataclass(frozen=True, kw_only=True)
class Result:
    """One benchmark's score, its intervals, its baselines, and the difference from another model's where asked for."""

    set: EvaluationSet
    scored: Scored
    failed: Mapping[str, str]
    ranges: Mapping[str, tuple[float, float]]
    differences: Mapping[str, Difference]
    baselines: Baselines

    def entry(self) -> dict[str, JSON]:
        """What `metrics.json` holds about it."""
        scored = self.scored
        metrics = {
            name: {
                "value": value,
                "interval_95": list(self.ranges[name]) if name in self.ranges else None,
                "n": scored.items_of(name),
            }
            for name, value in scored.metrics.items()
        }
        differences = {name: asdict(one) for name, one in self.differences.items()}
        return {
            "file": str(self.set.file),
            "file_sha256": file_sha256(self.set.file),
            "headline": next(iter(scored.metrics)),
            "n": scored.n,
            "metrics": metrics,
            "settings": scored.settings,
            "without_answer": len(scored.failed),
            "failed": {name: self.failed.get(name, "the predictions hold no answer") for name in scored.failed},
            **({"not_scored": dict(self.set.not_scored)} if self.set.not_scored else {}),
            "bootstrap": {"resamples": RESAMPLES, "units": len(scored.units)},
            **({"difference": differences} if differences else {}),
            "baselines": self.baselines.entry(),
        }


def table(results: Sequence[Result], *, details: bool = False) -> list[str]:
    """One line for each metric, the benchmark's name on its first; numbers as the official scripts have them."""
    paired = any(result.differences for result in results)
    head = ["benchmark", "metric", "value", "95 % interval", "n", "no answer"]
    rows = [head + (["difference", "95 % interval"] if paired else [])]
    for result in results:
        scored = result.scored
        names = [name for name in scored.metrics if details or DETAIL not in name]
        for name in names:
            limits, apart = result.ranges.get(name), result.differences.get(name)
            of_set = [str(scored.n), str(len(scored.failed))] if name == names[0] else ["", ""]
            row = [result.set.name if name == names[0] else "", name, f"{scored.metrics[name]:.2f}"]
            row += ["" if limits is None else f"{limits[0]:.2f} to {limits[1]:.2f}", *of_set]
            if paired:
                row += ["", ""] if apart is None else [f"{apart.value:+.2f}", f"{apart.low:+.2f} to {apart.high:+.2f}"]
            rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def finish(
    sets: Sequence[EvaluationSet],
    predictions: Mapping[str, Predictions],
    against: Mapping[str, Predictions] | None,
    options: argparse.Namespace,
    to: Path,
    exchanges: Mapping[str, Exchange] = MappingProxyType({}),
) -> Iterator[str]:
    """Scores, writes metrics, single scores and submissions; yields what there is to say.

    A benchmark that cannot be scored is refused at the end, when what the others have is written.

    Args:
        predictions: by benchmark.
        against: another model's, to compare with.
        options: the command's.
        to: the folder of results.
        exchanges: answers about exchanged pictures, by benchmark, where some were asked for.
    """
    finished: dict[str, tuple[EvaluationSet, Result | None]] = {}
    submissions: dict[str, tuple[str, str]] = {}
    reasons: dict[str, str] = {}
    for one in sets:
        mine = predictions[one.name]
        try:
            theirs = None if against is None else against[one.name]
            finished[one.name] = one, _result(one, mine, theirs, options, exchanges.get(one.name))
            with _named_failures(one):
                write = one.benchmark.submissions.get(one.mode, one.benchmark.submission)
                if write and (submission := write(one.examples, mine.answers)):
                    submissions[one.name] = submission
        except UserError as error:
            if len(sets) == 1:
                raise
            finished.pop(one.name, None)
            reasons[one.name] = one_line(str(error), LONGEST_REASON)
    for one, result in finished.values():
        yield from _write(one, result, predictions[one.name], submissions.get(one.name), to / one.name)
    results = [result for _, result in finished.values() if result is not None]
    if results:
        yield from table(results, details=options.all_metrics)
        yield from (f"{result.set.name}: {line}" for result in results for line in result.baselines.lines())
    if finished:
        first = sets[0].name
        origin = {
            "answers_of": str(options.adapter or options.model or options.predictions),
            "answers_sha256": predictions[first].sha256,
            "against": None if options.against is None else str(options.against),
            "against_sha256": None if against is None else against[first].sha256,
            "limit": options.limit,
        }
        yield from write_metrics(
            to / METRICS,
            origin,
            {result.set.name: result.entry() for result in results},
            asked=list(finished),
            options={name: dict(mine.options) for name, mine in predictions.items() if mine.options},
        )
    if reasons:
        (first, reason), *_ = reasons.items()
        raise UserError(f"{len(reasons)} of {len(sets)} benchmarks not scored: {', '.join(reasons)}; {first}: {reason}")


def _result(
    one: EvaluationSet,
    mine: Predictions,
    theirs: Predictions | None,
    options: argparse.Namespace,
    exchange: Exchange | None,
) -> Result | None:
    """None where a judge or a server scores."""
    if one.scorer is None:
        return None
    scorer, after = one.scorer, options.answer_after
    if one.name == "exact_match" and after:
        scorer = partial(exact_match, answer_after=after)
    scored = _score(one, mine, scorer)

    def says(example: Example) -> str:
        """The right answer as a model says it: a choice's label or letter, else the words that are compared."""
        if not one.benchmark.chooses and not one.benchmark.labels_choices:
            return final_answer(right_text(example), after) or ""
        index = correct_index(example)
        return f"a{index}" if one.benchmark.labels_choices else ascii_uppercase[index]

    differences = {} if theirs is None else paired_differences(scored, _score(one, theirs, scorer))
    with _named_failures(one):
        baselines = compared(scored, one.scored, mine.answers, scorer, says=says, exchange=exchange)
    return Result(
        set=one,
        scored=scored,
        failed=mine.failed,
        ranges=intervals(scored),
        differences=differences,
        baselines=baselines,
    )


def _score(one: EvaluationSet, predictions: Predictions, scorer: Scorer) -> Scored:
    answers = {name: answer for name, answer in predictions.answers.items() if name not in one.not_scored}
    with _named_failures(one):
        scored = scorer(one.scored, answers)
    if one.mode:
        scored.settings.setdefault("mode", one.mode)
    if predictions.joined_by:
        scored.settings.setdefault("answers found by", predictions.joined_by)
    return scored


@contextlib.contextmanager
def _named_failures(one: EvaluationSet) -> Iterator[None]:
    """What a scorer trips over in a record becomes a line; of an installed package's scorer as well."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{one.file}: a record holds something that the scorer of {one.name} cannot read "
            f"({type(error).__name__}: {shown(str(error), 120)}); prepare the set again"
        ) from error


def _write(
    one: EvaluationSet, result: Result | None, mine: Predictions, submission: tuple[str, str] | None, folder: Path
) -> Iterator[str]:
    if mine.strangers:
        yield (
            f"{one.name}: {len(mine.strangers)} answers belong to none of its questions and are left out, first "
            f"{shown(mine.strangers[0])}"
        )
    if submission is not None:
        name, text = submission
        with whole_file(folder / name) as stream:
            stream.write(text)
        yield f"{folder / name}: for {one.name}'s server or judge"
    if result is None:
        (folder / SCORES).unlink(missing_ok=True)  # of another split, asked before
        yield f"{one.name}: {one.file} holds no answers, or a judge scores it; no score here"
        return
    if one.not_scored:
        yield (
            f"{one.name}: {len(one.not_scored)} of {len(one.examples)} records hold no right answer and are in no "
            f"score, first {shown(next(iter(one.not_scored)))}; metrics.json names all"
        )
    with whole_file(folder / SCORES) as stream:
        for name, share in result.scored.per_item.items():
            stream.write(json.dumps({"id": name, "score": share}, ensure_ascii=False) + "\n")
