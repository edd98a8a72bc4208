"""A run as reports read it: its folder, as far as it has come, and its tests as tables, answers and confusion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from math import inf
from pathlib import Path
from typing import Any

from dora_vl.adapters.files import RECIPE_FILE
from dora_vl.errors import UserError
from dora_vl.evaluation.baselines import ADVICE, COMMONEST, EXCHANGED, READABLE, UNTRAINED, WARNING, probe_lines
from dora_vl.evaluation.predictions import PREDICTIONS, Prediction
from dora_vl.evaluation.scores.exact import normalised
from dora_vl.evaluation.scores.scored import SHARES, Difference, paired_differences
from dora_vl.evaluation.test_sets import AnswerScore, SetResult, read_results
from dora_vl.files import json_or_nothing
from dora_vl.run.folder import (
    ADAPTER,
    LOSS_LOG,
    METRICS,
    PLAN,
    SETTINGS,
    SKIPPED,
    Watched,
    path_in_run,
    read_log,
    read_watched,
)

LogLine = Mapping[str, Any]
Results = Mapping[str, SetResult]
AnswerRecord = tuple[Prediction, AnswerScore]
BASELINES = {
    UNTRAINED: "the untrained base",
    COMMONEST: "each question's commonest answer",
    EXCHANGED: "with pictures exchanged",
    READABLE: "what a linear probe reads from the base's pictures",
}
MOST_LABELS = 24
OTHER = "other"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run; files that are not there yet are empty."""

    label: str
    folder: Path
    settings: LogLine
    log: tuple[LogLine, ...]
    metrics: LogLine
    plan: LogLine
    recipe: LogLine
    skipped: tuple[tuple[str, str, bool], ...]
    """Holds id and reason of each unusable sample, and whether it is of the validation data."""
    watched: Watched | None

    def section(self, name: str) -> LogLine:
        """Returns a section of the settings; empty where there is none."""
        result = self.settings.get(name)
        return result if isinstance(result, Mapping) else {}

    def path(self, path: object) -> Path:
        """Finds a path of the settings."""
        return path_in_run(path, self.folder, self.settings)

    @property
    def last_step(self) -> int:
        """The last step that the log knows."""
        return max(int(line["step"]) for line in self.log)

    @cached_property
    def benchmarks(self) -> Results:
        """Holds what `dora-vl evaluate` left in the folder `evaluation`."""
        folder = self.folder / "evaluation"
        return read_results(folder) if (folder / METRICS).is_file() else {}


def read_record(folder: Path, label: str) -> RunRecord:
    """Reads a run's folder. Raises UserError: it is not one, or training has not begun in it."""
    log = read_log(folder / LOSS_LOG)
    if not log:
        raise UserError(
            f"{folder} has no line in its {LOSS_LOG}: it is not a run's folder, or its training has not begun"
        )
    return RunRecord(
        label=label,
        folder=folder,
        settings=json_or_nothing(folder / SETTINGS),
        log=tuple(log),
        metrics=json_or_nothing(folder / METRICS),
        plan=json_or_nothing(folder / PLAN),
        recipe=json_or_nothing(folder / ADAPTER / RECIPE_FILE),
        skipped=tuple(
            (str(line.get("id")), str(line.get("reason")), line.get("of") == "validation")
            for line in read_log(folder / SKIPPED)
        ),
        watched=read_watched(folder),
    )


def read_tests(run: RunRecord) -> tuple[Results, list[str]]:
    """Reads every set that a run was tested on, and says where there is none."""
    if not (run.folder / PREDICTIONS).is_file():
        return {}, [f"{run.label}: it holds no {PREDICTIONS}; a run answers its evaluation.file after training."]
    try:
        return read_results(run.folder), []
    except UserError as error:
        return {}, [f"{run.label}: {error}."]


def is_accuracy(result: SetResult) -> bool:
    """Returns True if the metric counts answers as right or wrong."""
    return result.entry.get("headline") in SHARES


@dataclass(frozen=True, kw_only=True)
class ScoreCell:
    """A run's value of a metric; its `difference` from the first run is `clear` where 0 is outside its interval."""

    value: float
    n: int
    interval: tuple[float, float] | None
    difference: str = ""
    clear: bool = False


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """One metric of one set over the runs; None where a run has no such number."""

    test: str
    metric: str
    cells: tuple[ScoreCell | None, ...]

    @property
    def n(self) -> int:
        """Counts the items that the metric is over."""
        return next(cell.n for cell in self.cells if cell is not None)

    @property
    def is_part(self) -> bool:
        """Tells whether the metric is of a part of the set."""
        return "/" in self.metric


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """How often each right answer (a row) was answered with each (a column)."""

    title: str
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    def share(self, row: int, column: int) -> float:
        """Returns the share of the row's answers; a count above 0 is always visible."""
        counts = self.counts[row]
        return max(0.12, counts[column] / sum(counts)) if counts[column] else 0.0


def score_rows(by_run: Sequence[Results]) -> tuple[list[ScoreRow], list[str]]:
    """Returns a row for each metric of each set, paired with the first run's, and notes on those that are not."""
    cells: list[dict[tuple[str, str], ScoreCell]] = []
    notes: dict[str, None] = {}
    for number, results in enumerate(by_run):
        of_run: dict[tuple[str, str], ScoreCell] = {}
        for name, result in results.items():
            first = by_run[0].get(name) if number else None
            differences: Mapping[str, Difference] = {}
            if first is not None and first.scored is not None and result.scored is not None:
                try:
                    differences = paired_differences(result.scored, first.scored)
                except UserError as error:
                    notes[f"No paired difference for {name}: {error}."] = None
            baselines = result.entry.get("baselines") or {}
            titled = {title: baselines[key] for key, title in BASELINES.items() if key in baselines}
            for metric, entry in {**result.entry["metrics"], **titled}.items():
                of_run[name, metric] = _cell(entry, differences.get(metric))
        cells.append(of_run)
    names = [*dict.fromkeys(name for results in by_run for name in results)]
    keys = dict.fromkeys(key for of_run in cells for key in of_run)
    rows = [
        ScoreRow(test=name, metric=metric, cells=tuple(of_run.get((name, metric)) for of_run in cells))
        for name, metric in sorted(keys, key=lambda key: names.index(key[0]))
    ]
    return rows, [*notes]


def _cell(entry: Mapping[str, Any], apart: Difference | None) -> ScoreCell:
    limits = entry["interval_95"]
    difference = "" if apart is None else f"{apart.value:+.2f} ({apart.low:+.2f} to {apart.high:+.2f})"
    return ScoreCell(
        value=float(entry["value"]),
        n=int(entry["n"]),
        interval=None if limits is None else (limits[0], limits[1]),
        difference=difference,
        clear=apart is not None and (apart.low > 0 or apart.high < 0),
    )


def blind(label: str, *several: Results) -> list[str]:
    """Warns of each set whose answers do not depend on its pictures, or use less than the pictures hold."""
    entries = [(name, result.entry.get("baselines") or {}) for results in several for name, result in results.items()]
    notes = [(name, baselines.get(key)) for name, baselines in entries for key in (WARNING, ADVICE)]
    return [f"{label}, {name}: {note}." for name, note in notes if note]


def questions_of(results: Results) -> dict[str, str]:
    """Tells of each question of a run's tests what can be read of the base's pictures, and what was learned."""
    probes = ((result.entry.get("baselines") or {}).get(READABLE) or {} for result in results.values())
    return {name: text for probe in probes for name, text in probe_lines(probe.get("questions") or {}).items()}


def confusion(title: str, result: SetResult) -> Confusion | None:
    """Counts the answers of a closed list; None where there are too many, or they are hardly repeated.

    A right answer in other words, or another of several right ones, counts as the right answer that is named.
    """
    full = 1.0 if is_accuracy(result) else inf
    pairs = [
        (normalised(item.truth), normalised(item.truth if item.score.share >= full else item.answer))
        for item in result.items.values()
        if item.truth and not item.score.failed
    ]
    counts = Counter(truth for truth, _ in pairs)
    if not 2 <= len(counts) <= MOST_LABELS or len(pairs) < 2 * len(counts):
        return None
    labels = tuple(sorted(counts, key=lambda label: (-counts[label], label)))
    cells = Counter((truth, answer if answer in counts else OTHER) for truth, answer in pairs)
    columns = (*labels, OTHER) if any(answer not in counts for _, answer in pairs) else labels
    rows = tuple(tuple(cells[truth, answer] for answer in columns) for truth in labels)
    return Confusion(title=title, labels=labels, columns=columns, counts=rows)


def low_and_high(result: SetResult) -> tuple[list[AnswerRecord], list[AnswerRecord]]:
    """Returns the answers with a score of their own from the lowest on and from the highest, of every kind in turn.

    For an accuracy they are the wrong and the right answers, for other scores the two halves.
    """
    answers = [(result.predictions[name], item) for name, item in result.items.items() if name in result.predictions]
    answers.sort(key=lambda answer: answer[1].score.share)
    wrong = sum(item.score.share < 0.5 for _, item in answers)
    half = wrong if is_accuracy(result) else -(-len(answers) // 2)
    return _in_turn(answers[:half]), _in_turn(answers[half:][::-1])


def _in_turn(answers: Sequence[AnswerRecord]) -> list[AnswerRecord]:
    by_kind: dict[str, list[AnswerRecord]] = {}
    for row, item in answers:
        by_kind.setdefault(item.kind, []).append((row, item))
    return [answer for several in zip_longest(*by_kind.values()) for answer in several if answer is not None]
