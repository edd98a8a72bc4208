"""From predictions to scores and files: what `dora-vl evaluate` does once every question has been asked.

A benchmark is scored before anything of it is written, and one that cannot be scored takes no other one with it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from types import MappingProxyType
from typing import Any

from dora_vl.data.example import Example, whole_file
from dora_vl.errors import UserError, one_line, shown
from dora_vl.evaluation.baselines import Exchange, compared, right_text
from dora_vl.evaluation.benchmarks import EvaluationSet
from dora_vl.evaluation.predictions import METRICS, Predictions, write_metrics
from dora_vl.evaluation.scores.benchmark import Scorer, correct_index
from dora_vl.evaluation.scores.exact import final_answer
from dora_vl.evaluation.scores.exact import score as exact_match
from dora_vl.evaluation.scores.scored import RESAMPLES, Scored, intervals, paired_differences
from dora_vl.files import file_sha256

SCORES = "scores.jsonl"
LONGEST_REASON = 300


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
        exchanges: answers about exchanged pictures, by benchmark, where some were asked for.
    """
    entries: dict[str, dict[str, Any]] = {}
    shares: dict[str, Mapping[str, float]] = {}
    lines: list[str] = []
    submissions: dict[str, tuple[str, str]] = {}
    reasons: dict[str, str] = {}
    for dataset in sets:
        name, mine = dataset.name, predictions[dataset.name]
        theirs = None if against is None else against[name]
        try:
            write = dataset.benchmark.submissions.get(dataset.mode, dataset.benchmark.submission)
            submission = None if write is None else write(dataset.examples, mine.answers)
            if dataset.scorer is not None:  # else a judge or a server scores
                scored, entries[name], comparison = _result(dataset, mine, theirs, options, exchanges.get(name))
                shares[name] = scored.per_item
                lines += [f"{name}: {line}" for line in comparison]
            if submission:
                submissions[name] = submission
        except (UserError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            unreadable = (  # an installed package's scorer trips too
                f"{dataset.file}: a record holds something that the scorer of {name} cannot read "
                f"({type(error).__name__}: {shown(str(error), 120)}); prepare the set again"
            )
            failure = error if isinstance(error, UserError) else UserError(unreadable)
            if len(sets) == 1:
                raise failure from (None if failure is error else error)
            reasons[name] = one_line(str(failure), LONGEST_REASON)
    finished = [dataset for dataset in sets if dataset.name not in reasons]
    for dataset in finished:
        name = dataset.name
        yield from _write(dataset, shares.get(name), predictions[name], submissions.get(name), to / name)
    if entries:
        yield from table(entries, details=options.all_metrics)
        yield from lines
    if finished:
        first = sets[0].name
        origin = {
            "answers_of": str(options.adapter or options.model or options.predictions),
            "answers_sha256": predictions[first].sha256,
            "against": None if options.against is None else str(options.against),
            "against_sha256": None if against is None else against[first].sha256,
            "limit": options.limit,
        }
        asked_with = {name: dict(mine.options) for name, mine in predictions.items() if mine.options}
        names = [dataset.name for dataset in finished]
        yield from write_metrics(to / METRICS, origin, entries, asked=names, options=asked_with)
    if reasons:
        (name, reason), *_ = reasons.items()
        raise UserError(f"{len(reasons)} of {len(sets)} benchmarks not scored: {', '.join(reasons)}; {name}: {reason}")


def _score(dataset: EvaluationSet, predictions: Predictions, scorer: Scorer) -> Scored:
    answers = {name: answer for name, answer in predictions.answers.items() if name not in dataset.not_scored}
    scored = scorer(dataset.scored, answers)
    if dataset.mode:
        scored.settings.setdefault("mode", dataset.mode)
    if predictions.joined_by:
        scored.settings.setdefault("answers found by", predictions.joined_by)
    return scored


def _result(
    dataset: EvaluationSet,
    mine: Predictions,
    theirs: Predictions | None,
    options: argparse.Namespace,
    exchange: Exchange | None,
) -> tuple[Scored, dict[str, Any], list[str]]:
    """A benchmark's score, what `metrics.json` holds about it, and what to say of its baselines."""
    scorer, after = dataset.scorer, options.answer_after
    assert scorer is not None
    if dataset.name == "exact_match" and after:
        scorer = partial(exact_match, answer_after=after)
    scored = _score(dataset, mine, scorer)
    benchmark = dataset.benchmark

    def says(example: Example) -> str:
        """The right answer as a model says it: a choice's label or letter, else the words that are compared."""
        if not benchmark.chooses and not benchmark.labels_choices:
            return final_answer(right_text(example), after)
        index = correct_index(example)
        return f"a{index}" if benchmark.labels_choices else ascii_uppercase[index]

    baselines, lines = compared(scored, dataset.scored, mine.answers, scorer, says=says, exchange=exchange)
    limits = intervals(scored)
    apart = {} if theirs is None else paired_differences(scored, _score(dataset, theirs, scorer))
    differences = {name: asdict(difference) for name, difference in apart.items()}
    entry = {
        "file": str(dataset.file),
        "file_sha256": file_sha256(dataset.file),
        "headline": next(iter(scored.metrics)),
        "n": scored.n,
        "metrics": {
            name: {
                "value": value,
                "interval_95": list(limits[name]) if name in limits else None,
                "n": scored.items_of(name),
            }
            for name, value in scored.metrics.items()
        },
        "settings": scored.settings,
        "without_answer": len(scored.failed),
        "failed": {name: mine.failed.get(name, "the predictions hold no answer") for name in scored.failed},
        **({"not_scored": dict(dataset.not_scored)} if dataset.not_scored else {}),
        "bootstrap": {"resamples": RESAMPLES, "units": len(scored.units)},
        **({"difference": differences} if differences else {}),
        "baselines": baselines,
    }
    return scored, entry, lines


def table(entries: Mapping[str, Mapping[str, Any]], *, details: bool = False) -> list[str]:
    """One line for each metric, the benchmark's name on its first; numbers as the official scripts have them.

    Args:
        details: also metrics of parts of a set, which have "/" in their name and are else in the file alone.
    """
    paired = any("difference" in entry for entry in entries.values())
    head = ["benchmark", "metric", "value", "95 % interval", "n", "no answer"]
    rows = [head + (["difference", "95 % interval"] if paired else [])]
    for name, entry in entries.items():
        of_set = [name, str(entry["n"]), str(entry["without_answer"])]
        for metric, numbers in entry["metrics"].items():
            if "/" in metric and not details:
                continue
            limits, apart = numbers["interval_95"], entry.get("difference", {}).get(metric)
            interval = "" if limits is None else f"{limits[0]:.2f} to {limits[1]:.2f}"
            row = [of_set[0], metric, f"{numbers['value']:.2f}", interval, *of_set[1:]]
            if paired and apart is not None:
                row += [f"{apart['value']:+.2f}", f"{apart['low']:+.2f} to {apart['high']:+.2f}"]
            rows.append(row + [""] * (len(rows[0]) - len(row)))
            of_set = ["", "", ""]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _write(
    dataset: EvaluationSet,
    shares: Mapping[str, float] | None,
    mine: Predictions,
    submission: tuple[str, str] | None,
    folder: Path,
) -> Iterator[str]:
    """Writes a benchmark's submission and single scores, None of them where a judge or a server scores."""
    if mine.strangers:
        yield (
            f"{dataset.name}: {len(mine.strangers)} answers belong to none of its questions and are left out, first "
            f"{shown(mine.strangers[0])}"
        )
    if submission is not None:
        name, text = submission
        with whole_file(folder / name) as stream:
            stream.write(text)
        yield f"{folder / name}: for {dataset.name}'s server or judge"
    if shares is None:
        (folder / SCORES).unlink(missing_ok=True)  # of another split, asked before
        yield f"{dataset.name}: {dataset.file} holds no answers, or a judge scores it; no score here"
        return
    if dataset.not_scored:
        bare = list(dataset.not_scored)
        yield (
            f"{dataset.name}: {len(bare)} of {len(dataset.examples)} records hold no right answer and are in no "
            f"score, first {shown(bare[0])}; metrics.json names all"
        )
    with whole_file(folder / SCORES) as stream:
        for name, share in shares.items():
            stream.write(json.dumps({"id": name, "score": share}, ensure_ascii=False) + "\n")
