"""What a test leaves in its folder, and how it is read again: nobody scores an answer twice.

`predictions.jsonl` holds what was answered, `scores.jsonl` each item's columns, and `metrics.json` by set every metric
with its value as the official script prints it, its 95 % interval and the formula that computes it from the columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from dora_vl.data.example import JSON
from dora_vl.data.text_file import json_lines
from dora_vl.errors import UserError, short_repr
from dora_vl.evaluation.predictions import PREDICTIONS, Prediction, read_predictions
from dora_vl.evaluation.scores.caption import Bleu, Meteor
from dora_vl.evaluation.scores.scored import Formula, ItemScore, Mean, Ratio, Scored, Total
from dora_vl.files import METRICS, SETS, json_or_nothing

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
    return [dict(row) for _, row in json_lines(path, "scores")] if path.is_file() else []


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
