"""Test sets: what is asked, how it is asked and scored, and how one of them becomes an entry of `metrics.json`.

A run's test, `dora-vl evaluate` and a VL-BART's tasks differ in the list of sets that they make, and in nothing else.
What a test leaves is read again, so that nobody scores an answer twice: `predictions.jsonl` holds what was answered,
`scores.jsonl` each item's columns, and `metrics.json` by set every metric with its value as the official script prints
it, its 95 % interval and the formula that computes it from the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from dora_vl.data.example import JSON, Example
from dora_vl.data.text_file import json_lines
from dora_vl.errors import UserError, one_line, short_repr
from dora_vl.evaluation.baselines import (
    ADVICE,
    UNTRAINED,
    ComparisonAnswers,
    advice,
    compare_with,
    compare_with_baselines,
)
from dora_vl.evaluation.predictions import PREDICTIONS, Prediction, Predictions, read_predictions
from dora_vl.evaluation.questions import choice_text, expected, kind_of
from dora_vl.evaluation.scores.benchmark import Benchmark, GroupKey, Scorer, Submission
from dora_vl.evaluation.scores.caption import Bleu, Meteor
from dora_vl.evaluation.scores.scored import (
    RESAMPLES,
    SHARES,
    Difference,
    Formula,
    ItemScore,
    Mean,
    Ratio,
    Scored,
    Total,
    common_headline,
    intervals,
    paired_differences,
)
from dora_vl.files import METRICS, NOT_YET, SETS, json_or_nothing, whole_file, write_json, write_json_lines

if TYPE_CHECKING:
    from dora_vl.evaluation.predictor import Decoding, MediaReader


SCORES = "scores.jsonl"
FORMULAS: Mapping[str, type[Any]] = {kind.__name__: kind for kind in (Ratio, Total, Mean, Bleu, Meteor)}


def formula_record(formula: Formula) -> JSON:
    """Returns a formula as JSON; None for an installed package's own, which no file can hold."""
    if FORMULAS.get(type(formula).__name__) is not type(formula):
        return None
    values = {item.name: getattr(formula, item.name) for item in fields(cast(Any, formula))}
    if "parts" in values:
        values["parts"] = [formula_record(part) for part in values["parts"]]
        if None in values["parts"]:
            return None
    return {"is": type(formula).__name__, **values}


def _formula_of(record: Mapping[str, Any]) -> Formula:
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
    kind = FORMULAS[str(values.pop("is"))]
    if "parts" in values:
        values["parts"] = tuple(map(_formula_of, values["parts"]))
    return kind(**values)


@dataclass(frozen=True, kw_only=True)
class AnswerScore:
    """One item of a scored set: how right its answer is, and what of the answer was compared with what.

    Attributes:
        group: what a split must not tear apart, where the example names it.
        truth, answer: the parts that are compared, a choice in its words.
    """

    score: ItemScore
    kind: str = ""
    group: str = ""
    truth: str = ""
    answer: str = ""

    def line(self, name: str, item: str) -> dict[str, JSON]:
        """Returns the item as a line of `scores.jsonl`."""
        score = self.score
        return {
            **{"set": name, "id": item, "unit": score.unit, "group": self.group, "kind": self.kind},
            **{"share": score.share, "failed": score.failed, "truth": self.truth, "answer": self.answer},
            "columns": dict(score.columns),
        }


@dataclass(frozen=True, kw_only=True)
class SetResult:
    """One set of a test, read again; `scored` is None where a judge or a server scores it."""

    name: str
    entry: Mapping[str, Any]
    scored: Scored | None
    items: Mapping[str, AnswerScore] = field(default_factory=dict)
    predictions: Mapping[str, Prediction] = field(default_factory=dict)


def score_lines(folder: Path) -> list[dict[str, Any]]:
    """Reads the lines of a folder's `scores.jsonl`; none where it has no such file."""
    path = folder / SCORES
    return [dict(line) for _, line in json_lines(path, "scores")] if path.is_file() else []


def read_results(folder: Path) -> dict[str, SetResult]:
    """Reads every set of a test's folder, by name. Raises UserError: the files do not belong together."""
    entries = json_or_nothing(folder / METRICS).get(SETS)
    if not isinstance(entries, Mapping):
        raise UserError(f"{folder} holds no result of a test ({METRICS} without {SETS!r})")
    path = folder / PREDICTIONS
    predictions = read_predictions(path) if path.is_file() else {}
    try:
        return results_of(entries, score_lines(folder), predictions)
    except (KeyError, TypeError, AttributeError) as error:
        reason = short_repr(f"{type(error).__name__}: {error}")
        raise UserError(f"{folder}: {SCORES} or {METRICS} is damaged ({reason}); test again") from None


def read_scores(folder: Path) -> dict[str, Scored]:
    """Reads the score of each set of a test's folder that is scored here. Raises UserError as `read_results` does."""
    return {name: result.scored for name, result in read_results(folder).items() if result.scored is not None}


def results_of(
    entries: Mapping[str, Mapping[str, Any]],
    lines: Iterable[Mapping[str, Any]],
    predictions: Mapping[str, Mapping[str, Prediction]] = MappingProxyType({}),
) -> dict[str, SetResult]:
    """Returns every set of a test, of the entries of its `metrics.json` and the lines of its `scores.jsonl`."""
    items: dict[str, dict[str, AnswerScore]] = {}
    for line in lines:
        score = ItemScore(unit=line["unit"], share=line["share"], columns=line["columns"], failed=line["failed"])
        more = {name: line[name] for name in ("kind", "group", "truth", "answer")}
        items.setdefault(line["set"], {})[line["id"]] = AnswerScore(score=score, **more)
    return {
        name: SetResult(
            name=name,
            entry=entry,
            scored=_scored(entry, items[name]) if name in items else None,
            items=items.get(name, {}),
            predictions=predictions.get(name, {}),
        )
        for name, entry in entries.items()
    }


def _scored(entry: Mapping[str, Any], items: Mapping[str, AnswerScore]) -> Scored:
    formulas = {name: _formula_of(record) for name, record in entry["formulas"].items() if record is not None}
    return Scored(
        metrics={name: metric["value"] for name, metric in entry["metrics"].items()},
        items={name: item.score for name, item in items.items()},
        formulas=formulas,
        settings=entry["settings"],
    )


LONGEST_REASON = 300
NO_ANSWER = "the predictions hold no answer"
UNREADABLE = (AttributeError, IndexError, KeyError, TypeError, ValueError)  # what scorers raise at odd records


@dataclass(frozen=True, kw_only=True)
class TestSet:
    """Examples, how a model is asked them, and how its answers are scored.

    Attributes:
        score: None where the file holds no answers, or a judge or a server scores.
        decoding, media: how a model answers, and what reads the pictures; None where a file holds the answers.
        prompt: gives an example the turns that it is asked by.
        truth: the right answer as the model would say it, "" where the file holds none; baselines are made of it.
        compared: the part of a text that is compared with the right one, for people to read.
        unreadable: why a row of the file cannot be asked, by id; it counts as wrong, unless it is in `not_scored`.
        not_scored: why an example is in no score, by id.
        settings: what the answers depend on; an earlier run's answers with others are not taken.
        together: examples with equal values are exchanged as one.
        item: gives the id of what an example is scored as, such as the clip of several captions.
        submission: the name and text of the file that the set's server takes.
        about: what else `metrics.json` says of the set, such as its file.
        benchmark: the published benchmark that it is of; without a score where it is of none.
    """

    __test__ = False

    name: str
    examples: Sequence[Example]
    score: Scorer | None
    decoding: Decoding | None = None
    media: MediaReader | None = None
    prompt: Callable[[Example], Example] = lambda example: example
    truth: Callable[[Example], str] = expected
    compared: Callable[[Example, str], str] = choice_text
    unreadable: Mapping[str, str] = field(default_factory=dict)
    not_scored: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    together: GroupKey | None = None
    item: Callable[[Example], str] = lambda example: example.id
    submission: Submission | None = None
    about: Mapping[str, JSON] = field(default_factory=dict)
    benchmark: Benchmark = field(default_factory=lambda: Benchmark(modes={}))

    @cached_property
    def asked(self) -> list[Example]:
        """The examples that a model is asked, with their turns."""
        return [self.prompt(example) for example in self.examples if example.id not in self.unreadable]

    @cached_property
    def scored_examples(self) -> list[Example]:
        """The examples that a score is over."""
        return [example for example in self.examples if example.id not in self.not_scored]


@dataclass(frozen=True, kw_only=True)
class Tested:
    """A test set with the answers to it and their score, or why it is `refused`.

    `remarks` are sentences about what it is compared with; `differences` are from the answers named `against`.
    """

    __test__ = False

    test: TestSet
    predictions: Predictions
    scored: Scored | None = None
    refused: UserError | None = None
    submission: tuple[str, str] | None = None
    baselines: Mapping[str, Any] = field(default_factory=dict)
    remarks: Sequence[str] = ()
    against: str = ""
    differences: Mapping[str, Difference] = field(default_factory=dict)

    @cached_property
    def intervals(self) -> Mapping[str, tuple[float, float]]:
        """The 95 % interval of each metric that is a formula."""
        return {} if self.scored is None else intervals(self.scored)

    @property
    def is_accuracy(self) -> bool:
        """True where an answer is right or wrong."""
        return self.scored is not None and self.scored.headline in SHARES

    def entry(self) -> dict[str, Any]:
        """Returns the set's entry of `metrics.json`."""
        test, predictions, scored = self.test, self.predictions, self.scored
        reasons = {**test.unreadable, **predictions.failed}
        of_answers = {
            "empty_answers": sum(not answer.strip() for answer in predictions.answers.values()),
            "seconds": round(predictions.seconds, 1),
            "answers_from_earlier_run": predictions.answered_before,
            **({"cut_texts": predictions.cut_texts} if predictions.cut_texts else {}),
            **({"not_scored": dict(test.not_scored)} if test.not_scored else {}),
            **test.about,
        }
        if scored is None:
            return {"n": len(test.examples), "metrics": {}, "formulas": {}, "failed": reasons, **of_answers}
        limits = self.intervals
        of_items = {test.item(example): reasons[example.id] for example in test.examples if example.id in reasons}
        return {
            "headline": scored.headline,
            "n": scored.n,
            "metrics": {
                name: {
                    "value": value,
                    "interval_95": list(limits[name]) if name in limits else None,
                    "n": scored.items_of(name),
                }
                for name, value in scored.metrics.items()
            },
            "formulas": {name: formula_record(formula) for name, formula in scored.formulas.items()},
            "settings": dict(scored.settings),
            "failed": {name: of_items.get(name, NO_ANSWER) for name in scored.failed},
            "bootstrap": {"resamples": RESAMPLES, "units": len(scored.units)},
            "baselines": dict(self.baselines),
            **({"against": self.against} if self.against else {}),
            "difference": {name: asdict(apart) for name, apart in self.differences.items()},
            **of_answers,
        }

    def lines(self) -> Iterable[dict[str, JSON]]:
        """Yields the set's lines of `scores.jsonl`."""
        if self.scored is None:
            return
        test, answers = self.test, self.predictions.answers
        by_item: dict[str, Example] = {}
        for example in sorted(test.scored_examples, key=lambda example: example.id not in answers):  # answered first
            by_item.setdefault(test.item(example), example)
        for item, score in self.scored.items.items():
            example = by_item[item]
            yield AnswerScore(
                score=score,
                kind=kind_of(example) or "",
                group=str(example.extra.get("group", "")),
                truth=test.compared(example, test.truth(example)),
                answer=test.compared(example, answers.get(example.id, "")),
            ).line(test.name, item)


def scored(test: TestSet, predictions: Predictions) -> Tested:
    """Scores answers and makes the server's file, or says why they cannot be scored."""
    tested = Tested(test=test, predictions=predictions)
    answers = {name: answer for name, answer in predictions.answers.items() if name not in test.not_scored}
    if test.decoding is not None and test.decoding.answer_method != "generation" and predictions.failed and not answers:
        name, reason = next(iter(predictions.failed.items()))
        return replace(tested, refused=UserError(f"{test.name}: no question has likelihoods; {name}: {reason}"))
    try:
        result = None if test.score is None else test.score(test.scored_examples, answers)
        submission = None if test.submission is None else test.submission(test.examples, predictions.answers)
    except UserError as error:
        return replace(tested, refused=error)
    except UNREADABLE as error:
        reason = (
            f"{test.about.get('file', test.name)}: a record holds something that the scorer of {test.name} cannot read "
            f"({type(error).__name__}: {short_repr(str(error), 120)}); prepare the set again"
        )
        return replace(tested, refused=UserError(reason))
    if result is not None and predictions.joined_by:
        result = replace(result, settings={**result.settings, "answers found by": predictions.joined_by})
    return replace(tested, scored=result, submission=submission)


def with_baselines(
    tested: Tested,
    exchange: ComparisonAnswers | None,
    untrained: ComparisonAnswers | None = None,
    readable: Mapping[str, str] = MappingProxyType({}),
    log: Sequence[Mapping[str, Any]] = (),
) -> Tested:
    """Adds the baselines that a score is compared with, and what the training's log advises."""
    test, result = tested.test, tested.scored
    if result is None or test.score is None:
        return tested
    answers = tested.predictions.answers
    baselines, remarks = compare_with_baselines(
        result,
        test.scored_examples,
        answers,
        test.score,
        right_answer_of=test.truth,
        exchange=exchange,
        readable=readable,
    )
    if text := advice(baselines, log, score=result.metrics[baselines["metric"]]):
        baselines[ADVICE], remarks = text, [*remarks, text]
    if untrained is not None:
        baselines[UNTRAINED], line = compare_with(UNTRAINED, untrained, test.scored_examples, answers, test.score)
        remarks = [line, *remarks]
    return replace(tested, baselines=baselines, remarks=remarks)


def with_differences(tested: Tested, rival: Tested, against: str) -> Tested:
    """Adds each metric's difference from other answers, paired over the set's units."""
    if tested.scored is None or rival.scored is None:
        return tested
    return replace(tested, against=against, differences=paired_differences(tested.scored, rival.scored))


@dataclass(frozen=True, kw_only=True)
class ResultFolder:
    """The files of a test, written anew after each set.

    Attributes:
        header: what `metrics.json` says beside its sets.
        kept: entries of an earlier test that are still true; each stays until its set is tested again.
        gone: names of the earlier test's other sets.
    """

    folder: Path
    header: Mapping[str, JSON] = field(default_factory=dict)
    kept: Mapping[str, JSON] = field(default_factory=dict)
    gone: Sequence[str] = ()

    def write(self, several: Sequence[Tested], *, not_yet: Sequence[str] = ()) -> None:
        """Writes what the sets have come to by now; `not_yet` names those that are still to be tested."""
        if not (several := [tested for tested in several if tested.refused is None]):
            return
        new = {tested.test.name: tested.entry() for tested in several}
        kept = [line for line in score_lines(self.folder) if line["set"] in self.kept.keys() - new.keys()]
        entries = {**self.kept, **new}
        average = average_of(entries)
        header = {**self.header, **({"average": average} if average else {}), **({NOT_YET: not_yet} if not_yet else {})}
        write_json_lines(self.folder / SCORES, chain(kept, *(tested.lines() for tested in several)))
        write_json(self.folder / METRICS, {**header, SETS: entries})  # last, since it names what the other holds
        for tested in several:
            if tested.submission is not None:
                with whole_file(submission_file(tested, self.folder)) as stream:
                    stream.write(tested.submission[1])


def submission_file(tested: Tested, folder: Path) -> Path:
    """Returns the file that the set's server or judge takes."""
    assert tested.submission is not None
    return folder / tested.test.name / tested.submission[0]


def average_of(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Averages the sets' headlines, where they may be averaged."""
    scored = [entry for entry in entries.values() if entry["metrics"]]
    if (name := common_headline([entry["headline"] for entry in scored])) is None:
        return None
    values = [entry["metrics"][name]["value"] for entry in scored]
    return {"metric": name, "value": sum(values) / len(values), "sets": len(values)}


def refuse_unscored(several: Sequence[Tested]) -> None:
    """Ends a test of which some sets cannot be scored, once the others are written."""
    reasons = {tested.test.name: tested.refused for tested in several if tested.refused is not None}
    for name, error in reasons.items():
        if len(several) == 1:
            raise error
        reason = one_line(str(error), LONGEST_REASON)
        raise UserError(f"{len(reasons)} of {len(several)} sets not scored: {', '.join(reasons)}; {name}: {reason}")
